"""The tiny decoder: chunk by chunk the bits of the whole, no state of its own, a model like any other of diffusers."""

import json

import pytest
import torch
from diffusers import AutoModel
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_diffusers import StreamingTinyDecoder, TinyVideoDecoder
from tests.support.tiny_decoder import small_decoder
from tests.support.tiny_vae import tiny_vae


CHANNELS = 8
CONFIGS = {
    "as for Wan2.2": {"layers_per_block": 3},
    "two stages": {"block_out_channels": (12, 8, 8), "time_upscale": (True, True), "space_upscale": (True, True)},
    "no patches": {"block_out_channels": (8, 8, 8, 8), "patch_size": 1},
    "eight frames": {"block_out_channels": (8, 8, 8, 8), "time_upscale": (True, True, True)},
    "a stage of one size": {"block_out_channels": (8, 8, 8, 8), "space_upscale": (True, False, True)},
    "one frame": {"block_out_channels": (8, 8), "time_upscale": (False,), "space_upscale": (True,)},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def random_latents(frames: int, height: int = 2, width: int = 3, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, CHANNELS, frames, height, width, generator=generator)


def decode(decoder: TinyVideoDecoder, *chunks: torch.Tensor) -> torch.Tensor:
    streaming = StreamingTinyDecoder(decoder)
    return torch.cat([streaming.decode(chunk) for chunk in chunks], dim=2)


# -- streaming -------------------------------------------------------------------------------------------------------


@every_config
@every_dtype
@pytest.mark.parametrize("lengths", [[6], [1, 5], [5, 1], [2, 2, 2], [1] * 6], ids=str)
def test_chunks_decode_to_the_bits_of_the_whole(config, dtype, lengths):
    decoder, latents = small_decoder(**config).to(dtype), random_latents(6).to(dtype)
    whole = decode(decoder, latents)
    assert whole.dtype == dtype and whole.isfinite().all() and whole.float().std() > 0.01
    assert torch.equal(decode(decoder, *latents.split(lengths, dim=2)), whole)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_any_chunking_decodes_to_the_bits_of_the_whole(lengths, seed):
    decoder, latents = small_decoder(), random_latents(sum(lengths), seed=seed)
    assert torch.equal(decode(decoder, *latents.split(lengths, dim=2)), decode(decoder, latents))


@every_config
@torch.no_grad()
def test_a_latent_frame_at_a_time_gives_the_pixels_of_one_forward(config):
    decoder, latents = small_decoder(**config), random_latents(5, batch=2)
    pixels, memory = decoder(latents)
    torch.testing.assert_close(decode(decoder, latents), pixels.clamp(-1, 1), atol=1e-6, rtol=0)
    further = random_latents(3, batch=2, seed=1)
    together = decoder(torch.cat([latents, further], dim=2))[0][:, :, pixels.shape[2] :]
    torch.testing.assert_close(decoder(further, memory)[0], together, atol=1e-6, rtol=0)


@every_config
def test_the_first_latent_frame_gives_one_frame_and_the_others_all(config):
    streaming = StreamingTinyDecoder(small_decoder(**config))
    space, time = streaming.decoder.spatial_scale, streaming.decoder.temporal_scale
    assert streaming.decode(random_latents(3)).shape == (1, 3, 1 + 2 * time, 2 * space, 3 * space)
    assert streaming.decode(random_latents(2)).shape == (1, 3, 2 * time, 2 * space, 3 * space)
    streaming.reset()
    assert streaming.decode(random_latents(1)).shape == (1, 3, 1, 2 * space, 3 * space)


def test_the_scales_are_those_of_the_settings():
    scales = {
        name: (decoder.spatial_scale, decoder.temporal_scale)
        for name, decoder in ((name, small_decoder(**config)) for name, config in CONFIGS.items())
    }
    assert scales == {
        "as for Wan2.2": (16, 4),
        "two stages": (8, 4),
        "no patches": (8, 4),
        "eight frames": (16, 8),
        "a stage of one size": (8, 4),
        "one frame": (4, 1),
    }


def test_no_frame_depends_on_a_later_latent():
    decoder, latents = small_decoder(), random_latents(6)
    other = latents.clone()
    other[:, :, 3] += 1
    one, two = decode(decoder, latents), decode(decoder, other)
    assert torch.equal(one[:, :, :9], two[:, :, :9])
    assert not torch.equal(one[:, :, 9:13], two[:, :, 9:13])
    assert not torch.equal(one[:, :, 13:17], two[:, :, 13:17])  # the past is seen


def test_samples_of_a_batch_and_interleaved_streams_do_not_meet():
    decoder = small_decoder()
    one, two = random_latents(4), random_latents(4, seed=1)
    alone = [decode(decoder, one), decode(decoder, two)]
    torch.testing.assert_close(decode(decoder, torch.cat([one, two])), torch.cat(alone), atol=1e-6, rtol=0)
    streams, made = [StreamingTinyDecoder(decoder) for _ in range(2)], ([], [])
    for frame in range(4):
        for stream, latents, pixels in zip(streams, (one, two), made, strict=True):
            pixels.append(stream.decode(latents[:, :, frame : frame + 1]))
    for pixels, expected in zip(made, alone, strict=True):
        assert torch.equal(torch.cat(pixels, dim=2), expected)


def test_what_is_kept_is_a_frame_of_the_input_of_each_block():
    streaming = StreamingTinyDecoder(small_decoder())
    assert streaming.num_bytes == 0
    kept = set()
    for length in (1, 4, 2):
        streaming.decode(random_latents(length))
        kept.add(streaming.num_bytes)
        assert all(features.untyped_storage().nbytes() == features.nbytes for features in streaming._memory)
    places = 2 * 3
    assert kept == {4 * places * (16 + 4 * 12 + 16 * 8)}
    streaming.reset()
    assert streaming.num_bytes == 0


def test_pixels_stay_in_their_range_however_large_latents_are():
    decoder = small_decoder()
    with torch.no_grad():
        decoder.conv_out.weight.mul_(1e3)
    pixels = decode(decoder, 1e6 * random_latents(2))
    assert pixels.min() == -1 and pixels.max() == 1


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((1, 7, 2, 2, 3), "latents [B, 8, F >= 1, h, w], got shape (1, 7, 2, 2, 3)"),
        ((8, 2, 2, 3), "got shape (8, 2, 2, 3)"),
        ((1, 8, 0, 2, 3), "got shape (1, 8, 0, 2, 3)"),
        ((1, 8, 1, 0, 3), "got shape (1, 8, 1, 0, 3)"),
        ((2, 8, 1, 2, 3), "has (batch, h, w) = (1, 2, 3), this chunk (2, 2, 3)"),
        ((1, 8, 1, 3, 2), "has (batch, h, w) = (1, 2, 3), this chunk (1, 3, 2)"),
    ],
)
def test_latents_of_other_shapes_are_refused_and_the_video_goes_on(shape, named):
    decoder, latents = small_decoder(), random_latents(4)
    streaming = StreamingTinyDecoder(decoder)
    first = streaming.decode(latents[:, :, :2])
    with pytest.raises(ValueError) as caught:
        streaming.decode(torch.zeros(shape))
    assert named in str(caught.value)
    assert torch.equal(torch.cat([first, streaming.decode(latents[:, :, 2:])], dim=2), decode(decoder, latents))


@pytest.mark.parametrize("failing", [1, 2], ids=["first frame", "second frame"])
def test_after_an_error_decoding_begins_again(failing):
    network, latents, calls = small_decoder(), random_latents(2), []
    decoder, expected = StreamingTinyDecoder(network), StreamingTinyDecoder(network).decode(random_latents(2))

    def out_of_memory(*_):
        calls.append(None)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("no memory is left")

    network.conv_out.register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.decode(latents)
    with pytest.raises(RuntimeError, match=r"`reset\(\)` first"):
        decoder.decode(latents)
    decoder.reset()
    assert torch.equal(decoder.decode(latents), expected)


@pytest.mark.parametrize("what", [tiny_vae(), None, "a path"], ids=["a VAE", "nothing", "a path"])
def test_what_is_no_tiny_decoder_is_refused(what):
    with pytest.raises(ValueError, match=f"Expected a TinyVideoDecoder, got {type(what).__name__}"):
        StreamingTinyDecoder(what)


# -- the model -------------------------------------------------------------------------------------------------------


def test_it_is_saved_and_loaded_by_itself_and_by_name(tmp_path):
    decoder, latents = small_decoder(), random_latents(3)
    decoder.save_pretrained(tmp_path)
    for loaded in (TinyVideoDecoder.from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert type(loaded) is TinyVideoDecoder and not loaded.training
        assert torch.equal(decode(loaded, latents), decode(decoder, latents))
    half, info = TinyVideoDecoder.from_pretrained(tmp_path, torch_dtype=torch.float16, output_loading_info=True)
    assert half.dtype == torch.float16 and info["missing_keys"] == []


def test_a_single_file_is_opened_otherwise(tmp_path):
    (tmp_path / "taew2_2.pth").touch()
    with pytest.raises(
        ValueError, match=r"taew2_2\.pth' is a single file: open it with TinyVideoDecoder\.from_original"
    ):
        TinyVideoDecoder.from_pretrained(tmp_path / "taew2_2.pth")


@pytest.mark.parametrize(
    ("layers", "found"), [(1, "has 18 weights that the model does not know"), (3, "lacks 18 of its weights")]
)
def test_weights_of_another_configuration_are_refused(tmp_path, layers, found):
    small_decoder(layers_per_block=2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_per_block": layers}))
    with pytest.raises(ValueError, match=found):
        TinyVideoDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"latent_channels": 0}, "`latent_channels` must be an integer of at least 1, got 0"),
        ({"layers_per_block": -1}, "`layers_per_block` must be an integer of at least 1"),
        ({"patch_size": "2"}, "patch_size has to be a whole number, got '2'"),
        ({"block_out_channels": (8, 0, 8, 8)}, "at least 1, got (8, 0, 8, 8)"),
        ({"block_out_channels": ()}, "at least 1, got ()"),
        ({"block_out_channels": (8, 8, 8)}, "got 3 and 3 for 3"),
        ({"time_upscale": (True,)}, "got 1 and 3 for 4"),
        ({"space_upscale": (True, True, "no")}, "space_upscale has to be a list of (true or false)"),
    ],
)
def test_settings_that_no_network_can_have_are_refused(config, named):
    with pytest.raises(ValueError) as caught:
        TinyVideoDecoder(**config)
    assert named in str(caught.value)


def test_every_weight_has_a_gradient_and_nothing_stays_on_the_module():
    decoder = small_decoder().train()
    before = set(vars(decoder))
    pixels, _ = decoder(random_latents(3))
    (pixels - 0.5).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in decoder.parameters())
    assert set(vars(decoder)) == before
