"""A tiny decoder in place of the VAE: in calls, in streams, for latents; refused where it is for others."""

import numpy as np
import PIL.Image
import pytest
import torch

from longlive_diffusers import LongLivePipeline, StreamingTinyDecoder, TinyVideoDecoder
from longlive_diffusers.models.streaming_vae import StreamingDecoder
from tests.support.tiny_decoder import small_decoder
from tests.support.tiny_pipeline import CHANNELS, tiny_arguments, tiny_pipeline
from tests.support.tiny_vae import tiny_vae


@pytest.fixture(scope="module")
def decoder() -> TinyVideoDecoder:
    return small_decoder()


@pytest.fixture(scope="module")
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


@pytest.fixture
def vae_decodes(pipe, monkeypatch) -> list[str]:
    """One entry for each call of the VAE's decoder."""
    calls = []
    monkeypatch.setattr(StreamingDecoder, "decode", lambda *_: calls.append("decode"))
    return calls


def run(pipe, **overrides):
    return pipe(**tiny_arguments(**{"output_type": "np", **overrides})).frames


def expected_frames(pipe, decoder: TinyVideoDecoder, **overrides) -> np.ndarray:
    """Of the latents as the transformer makes them, normalized."""
    latents = run(pipe, output_type="latent", **overrides)
    pixels = StreamingTinyDecoder(decoder).decode(latents.to(decoder.dtype)).float()
    return pixels.permute(0, 2, 3, 4, 1).numpy() / 2 + 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_gives_the_tiny_decoders_frames_of_the_same_latents(pipe, vae_decodes, dtype):
    decoder = small_decoder().to(dtype)
    frames = run(pipe, decoder=decoder)
    np.testing.assert_array_equal(frames, expected_frames(pipe, decoder))
    assert frames.shape == (1, 13, 64, 64, 3) and frames.std() > 0.01
    assert vae_decodes == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_gives_the_frames_of_the_call(pipe, decoder, vae_decodes, asynchronous):
    arguments = tiny_arguments(output_type="np", num_frames=21, decoder=decoder, async_decode=asynchronous)
    with pipe.stream(**arguments) as session:
        chunks = list(session)
    assert [chunk.frames.shape[1] for chunk in chunks] == [5, 8, 8]
    np.testing.assert_array_equal(
        np.concatenate([chunk.frames for chunk in chunks], axis=1), run(pipe, num_frames=21, decoder=decoder)
    )
    assert vae_decodes == []


def test_a_batch_and_other_sizes_and_layouts(pipe, decoder):
    options = {"prompt": ["a cat", "a dog"], "height": 32, "width": 96, "decoder": decoder}
    frames = run(pipe, **options)
    assert frames.shape == (2, 13, 32, 96, 3)
    as_tensor = run(pipe, output_type="pt", **options)
    np.testing.assert_allclose(as_tensor.permute(0, 1, 3, 4, 2).numpy(), frames)
    images = run(pipe, output_type="pil", **options)
    np.testing.assert_array_equal(np.asarray(images[1][3]), (frames[1, 3] * 255).round())


def test_latents_do_not_depend_on_the_decoder(pipe, decoder):
    assert torch.equal(run(pipe, output_type="latent", decoder=decoder), run(pipe, output_type="latent"))


def test_latents_are_decoded_by_themselves(pipe, decoder, vae_decodes):
    latents = run(pipe, output_type="latent")
    np.testing.assert_array_equal(pipe.decode_latents(latents, decoder=decoder), run(pipe, decoder=decoder))
    assert vae_decodes == []


def test_an_image_is_encoded_by_the_vae(pipe, decoder, vae_decodes):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    frames = run(pipe, image=image, decoder=decoder)
    np.testing.assert_array_equal(frames, expected_frames(pipe, decoder, image=image))
    assert vae_decodes == []


def test_a_pipeline_without_a_vae_makes_frames(decoder):
    pipe = tiny_pipeline(vae=None)
    assert run(pipe, decoder=decoder).shape == (1, 13, 64, 64, 3)
    latents = run(pipe, output_type="latent")
    assert pipe.decode_latents(latents, decoder=decoder).shape == (1, 13, 64, 64, 3)
    for refused in (lambda: run(pipe), lambda: pipe.decode_latents(latents)):
        with pytest.raises(ValueError, match="this pipeline's VAE is NoneType"):
            refused()
    with pytest.raises(ValueError, match="this pipeline's VAE is NoneType"):
        run(pipe, image=np.zeros((64, 64, 3), np.float32), decoder=decoder)


def test_it_takes_turns_with_the_vae_in_sessions_of_one_pipeline(pipe, decoder):
    expected = {"tiny": run(pipe, decoder=decoder), "vae": run(pipe)}
    sessions = {
        "tiny": pipe.stream(**tiny_arguments(output_type="np", decoder=decoder)),
        "vae": pipe.stream(**tiny_arguments(output_type="np")),
    }
    made = {name: [] for name in sessions}
    for _ in range(2):
        for name, session in sessions.items():
            made[name].append(next(session).frames)
    for name, chunks in made.items():
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected[name])
    assert np.abs(expected["tiny"] - expected["vae"]).mean() > 0.01


REFUSED = {
    "channels": (lambda: small_decoder(latent_channels=48), ["48 channels", "have 8 channels"]),
    "space": (
        lambda: small_decoder(patch_size=1),
        ["8x8 pixels and 4 frames; this", "have 8 channels that span 16x16 pixels and 4 frames"],
    ),
    "time": (lambda: small_decoder(time_upscale=(True, True, True)), ["16x16 pixels and 8 frames", "and 4 frames"]),
    "a path": (lambda: "taew2_2.pth", ["`decoder` must be a TinyVideoDecoder, or None for the VAE, got str"]),
    "a VAE": (tiny_vae, ["got AutoencoderKLWan"]),
    "a stream": (lambda: StreamingTinyDecoder(small_decoder()), ["got StreamingTinyDecoder"]),
    "a boolean": (lambda: False, ["got bool"]),
}


@pytest.mark.parametrize("way", ["call", "stream", "latents"])
@pytest.mark.parametrize(("make", "named"), REFUSED.values(), ids=REFUSED)
def test_a_decoder_for_other_latents_is_refused_before_any_work(pipe, monkeypatch, way, make, named):
    monkeypatch.setattr(pipe.transformer, "forward", None)
    ways = {
        "call": lambda decoder: run(pipe, decoder=decoder),
        "stream": lambda decoder: pipe.stream(**tiny_arguments(output_type="np", decoder=decoder)),
        "latents": lambda decoder: pipe.decode_latents(torch.zeros(1, CHANNELS, 2, 4, 4), decoder=decoder),
    }
    with pytest.raises(ValueError) as caught:
        ways[way](make())
    assert all(words in str(caught.value) for words in named), caught.value


def test_of_an_offloaded_pipeline_chunks_are_decoded_as_they_come(pipe, decoder, monkeypatch):
    """The VAE would be moved in and out for each of them; a tiny decoder stays where it is."""
    order = []
    hooks = [
        pipe.transformer.register_forward_pre_hook(lambda *_: order.append("denoise")),
        decoder.register_forward_pre_hook(lambda *_: order.append("decode")),
    ]
    monkeypatch.setattr(LongLivePipeline, "is_offloaded", property(lambda _: True))
    try:
        run(pipe, decoder=decoder)
    finally:
        for hook in hooks:
            hook.remove()
    assert order.index("decode") < len(order) - 1 - order[::-1].index("denoise")
