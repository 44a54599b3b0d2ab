"""Decoding and encoding chunk by chunk: the same as doing it whole, in memory that does not grow."""

import functools

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from longlive_diffusers import StreamingDecoder, StreamingEncoder
from longlive_diffusers.models import streaming_vae
from longlive_diffusers.models.streaming_vae import latent_statistics, normalize_latents
from tests.support.tiny_vae import tiny_vae, wan_2_1_vae


Z_DIM = 8


VAES = {"wan 2.2": tiny_vae, "wan 2.1": wan_2_1_vae}
every_vae = pytest.mark.parametrize("make_vae", VAES.values(), ids=VAES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def random_latents(frames: int, height: int = 2, width: int = 3, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, Z_DIM, frames, height, width, generator=generator)


def random_pixels(frames: int, height: int = 32, width: int = 48, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def decode_in_chunks(vae: AutoencoderKLWan, latents: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    decoder = StreamingDecoder(vae)
    return torch.cat([decoder.decode(chunk) for chunk in latents.split(lengths, dim=2)], dim=2)


@torch.no_grad()
def decode_whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents).sample


@torch.no_grad()
def encode_whole(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    return vae.encode(pixels).latent_dist.mode()


def enable_small_tiles(vae: AutoencoderKLWan) -> None:
    """Tiles of 3 latents every 2, so that each overlaps the next by one."""
    scale = vae.spatial_compression_ratio
    vae.enable_tiling(3 * scale, 3 * scale, 2 * scale, 2 * scale)


# -- decoding --------------------------------------------------------------------------------------------------------

ROUNDING_OF_16_BITS = 1e-2  # root mean square, of pixels in [-1, 1], to what `vae.decode` makes


def assert_same_pixels(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    else:
        assert (found.float() - expected.float()).square().mean().sqrt() < ROUNDING_OF_16_BITS


CHUNKINGS = [[6], [1, 5], [5, 1], [2, 2, 2], [1] * 6, [1, 2, 3], [4, 2]]


@every_vae
@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [*((torch.float32, lengths) for lengths in CHUNKINGS), (torch.bfloat16, [6]), (torch.bfloat16, [1, 2, 3])],
    ids=str,
)
def test_chunks_decode_to_the_whole(make_vae, dtype, lengths):
    vae, latents = make_vae().to(dtype), random_latents(6).to(dtype)
    whole = decode_whole(vae, latents)
    assert whole.shape[2] == 1 + 4 * (6 - 1)
    assert_same_pixels(decode_in_chunks(vae, latents, lengths), whole)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_any_chunking_decodes_to_the_whole(lengths, seed):
    vae, latents = tiny_vae(), random_latents(sum(lengths), 1, 2, seed=seed)
    assert_same_pixels(decode_in_chunks(vae, latents, lengths), decode_whole(vae, latents))


@every_vae
def test_the_first_chunk_gives_one_frame_less_than_four_for_each_latent(make_vae):
    decoder = StreamingDecoder(make_vae())
    counts = [decoder.decode(random_latents(frames, seed=frames)).shape[2] for frames in (2, 3, 1)]
    assert counts == [5, 12, 4]


@every_vae
@every_dtype
def test_slicing_decodes_to_the_same(make_vae, dtype):
    """Each video of the batch by itself, with a feature cache of its own."""
    vae, latents = make_vae().to(dtype), random_latents(4, batch=3).to(dtype)
    vae.enable_slicing()
    sliced = decode_in_chunks(vae, latents, [1, 2, 1])
    assert_same_pixels(sliced, decode_whole(vae, latents))
    for row in range(3):
        assert torch.equal(sliced[row : row + 1], decode_in_chunks(vae, latents[row : row + 1], [1, 2, 1]))


SIZES = [(5, 7), (4, 3), (2, 6), (7, 2), (4, 4)]


@every_vae
@pytest.mark.parametrize(
    ("dtype", "height", "width"), [*((torch.float32, *size) for size in SIZES), (torch.bfloat16, 4, 3)]
)
def test_tiling_decodes_to_the_same(make_vae, dtype, height, width):
    """Also where the last tiles are narrower than the others, and where one axis needs no tiles."""
    vae, latents = make_vae().to(dtype), random_latents(4, height, width).to(dtype)
    enable_small_tiles(vae)
    whole = decode_whole(vae, latents)
    scale = vae.spatial_compression_ratio
    assert whole.shape[-2:] == (height * scale, width * scale)
    assert_same_pixels(decode_in_chunks(vae, latents, [2, 1, 1]), whole)


@every_vae
def test_tiling_is_not_used_for_what_one_tile_holds(make_vae):
    vae, latents = make_vae(), random_latents(3, 3, 3)
    untiled = decode_whole(vae, latents)
    enable_small_tiles(vae)
    assert_same_pixels(decode_in_chunks(vae, latents, [1, 2]), untiled)


SWITCHES = {
    "tiles": (
        lambda vae: None,
        enable_small_tiles,
        r"decoded whole, this chunk would be in tiles of \(24, 24\) pixels",
    ),
    "no tiles": (enable_small_tiles, AutoencoderKLWan.disable_tiling, "this chunk would be whole: `reset"),
    "steps": (
        enable_small_tiles,
        lambda vae: vae.enable_tiling(24, 24, 8, 8),
        r"one every \(16, 16\).* every \(8, 8\)",
    ),
    "slices": (lambda vae: None, AutoencoderKLWan.enable_slicing, "this chunk would be whole, each video by itself"),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_how_a_video_is_divided_does_not_change_in_it(switch):
    before, after, message = SWITCHES[switch]
    vae, latents = wan_2_1_vae(), random_latents(3, 5, 7, batch=2)
    before(vae)
    decoder = StreamingDecoder(vae)
    decoder.decode(latents[:, :, :1])
    after(vae)
    with pytest.raises(ValueError, match=message):
        decoder.decode(latents[:, :, 1:])
    decoder.reset()
    assert torch.equal(decoder.decode(latents), decode_in_chunks(vae, latents, [3]))


@every_vae
def test_uneven_tiles_decode_to_the_same(make_vae):
    """Tiles of other sizes in height and width, which are no multiples of a latent."""
    vae, latents = make_vae(), random_latents(3, 6, 7)
    scale = vae.spatial_compression_ratio
    vae.enable_tiling(4 * scale, 3 * scale, 2 * scale + scale // 2, 2 * scale)
    assert_same_pixels(decode_in_chunks(vae, latents, [2, 1]), decode_whole(vae, latents))


@every_vae
def test_slicing_and_tiling_together_decode_to_the_same(make_vae):
    vae, latents = make_vae(), random_latents(3, 5, 4, batch=2)
    vae.enable_slicing()
    enable_small_tiles(vae)
    assert_same_pixels(decode_in_chunks(vae, latents, [1, 2]), decode_whole(vae, latents))


def test_pixels_are_clamped():
    decoded = decode_in_chunks(tiny_vae(), 1000 * random_latents(3), [1, 2])
    assert decoded.abs().max() == 1


@every_vae
def test_a_reset_begins_another_video(make_vae):
    vae = make_vae()
    first, second = random_latents(3, seed=1), random_latents(3, 3, 2, seed=2)
    decoder = StreamingDecoder(vae)
    decoder.decode(first)
    decoder.reset()
    assert_same_pixels(decoder.decode(second), decode_whole(vae, second))


@every_vae
def test_two_videos_can_be_decoded_in_turns(make_vae):
    vae = make_vae()
    videos = [random_latents(4, seed=1), random_latents(4, 3, 3, seed=2)]
    decoders, decoded = [StreamingDecoder(vae) for _ in videos], [[], []]
    for start in range(0, 4, 2):
        for decoder, video, parts in zip(decoders, videos, decoded, strict=True):
            parts.append(decoder.decode(video[:, :, start : start + 2]))
    for video, parts in zip(videos, decoded, strict=True):
        assert_same_pixels(torch.cat(parts, dim=2), decode_whole(vae, video))


@every_vae
def test_the_vae_is_free_for_other_uses_between_chunks(make_vae):
    """`vae.decode` and `vae.encode` clear the feature cache of the VAE; the stream's is its own."""
    vae, latents = make_vae(), random_latents(4)
    expected = decode_whole(vae, latents)
    decoder, parts = StreamingDecoder(vae), []
    for chunk in latents.split(2, dim=2):
        parts.append(decoder.decode(chunk))
        other = random_latents(2, seed=5)
        assert torch.equal(decode_whole(vae, other), make_vae().decode(other).sample)
        encode_whole(vae, random_pixels(5))
    assert_same_pixels(torch.cat(parts, dim=2), expected)


def test_decoding_needs_no_gradient():
    latents = random_latents(2).requires_grad_()
    assert not StreamingDecoder(tiny_vae()).decode(latents).requires_grad


@pytest.mark.parametrize(
    "shape", [(1, Z_DIM, 2, 2), (1, Z_DIM + 1, 2, 2, 3), (1, Z_DIM, 0, 2, 3)], ids=["4 axes", "9 channels", "0 frames"]
)
def test_latents_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match=r"Expected latents \[B, 8, F >= 1, h, w\], got shape"):
        StreamingDecoder(tiny_vae()).decode(torch.zeros(shape))


@pytest.mark.parametrize("changed", [{"batch": 2}, {"height": 3}, {"width": 4}])
def test_a_chunk_of_another_size_than_the_last_raises(changed):
    decoder = StreamingDecoder(tiny_vae())
    decoder.decode(random_latents(1))
    with pytest.raises(ValueError, match=r"\(1, 2, 3\), this chunk .*`reset\(\)` first"):
        decoder.decode(random_latents(1, **changed))


@pytest.mark.parametrize("streaming", [StreamingDecoder, StreamingEncoder])
def test_another_vae_raises(streaming):
    with pytest.raises(ValueError, match="needs an AutoencoderKLWan, got AutoencoderKL"):
        streaming(AutoencoderKL())


# -- encoding --------------------------------------------------------------------------------------------------------


def with_exact_end_convolution(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """
    `vae.encode` applies one convolution, 1x1x1, to all frames in one call. The last bit of its float32 sums depends,
    in PyTorch on a CPU, on how many frames those are: a video of one frame is not quite the first frame of a video of
    two, whoever encodes it. With a single term in each sum there is nothing to round.
    """
    channels = vae.quant_conv.weight.shape[0]
    signs = torch.ones(channels)
    signs[::2] = -1
    permutation = torch.eye(channels).roll(1, dims=0) * signs
    vae.quant_conv.weight.data.copy_(permutation.view_as(vae.quant_conv.weight))
    return vae


def exact_wan_2_2_vae() -> AutoencoderKLWan:
    return with_exact_end_convolution(tiny_vae())


def exact_wan_2_1_vae() -> AutoencoderKLWan:
    return with_exact_end_convolution(wan_2_1_vae())


EXACT_VAES = {"wan 2.2": exact_wan_2_2_vae, "wan 2.1": exact_wan_2_1_vae}
every_exact_vae = pytest.mark.parametrize("make_vae", EXACT_VAES.values(), ids=EXACT_VAES)


def encode_in_chunks(vae: AutoencoderKLWan, pixels: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    encoder = StreamingEncoder(vae)
    return torch.cat([encoder.encode(chunk) for chunk in pixels.split(lengths, dim=2)], dim=2)


@every_exact_vae
@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [
        *((torch.float32, lengths) for lengths in ([17], [1, 16], [1, 4, 4, 4, 4], [5, 12], [9, 4, 4])),
        (torch.bfloat16, [5, 12]),
    ],
    ids=str,
)
def test_chunks_encode_to_the_bits_of_the_whole(make_vae, dtype, lengths):
    vae, pixels = make_vae().to(dtype), random_pixels(17).to(dtype)
    whole = encode_whole(vae, pixels)
    assert whole.shape[2] == 1 + 16 // 4
    assert torch.equal(encode_in_chunks(vae, pixels, lengths), whole)


@every_exact_vae
def test_an_image_is_a_video_of_one_frame(make_vae):
    vae, image = make_vae(), random_pixels(1)
    assert torch.equal(StreamingEncoder(vae).encode(image), encode_whole(vae, image))


@every_exact_vae
def test_a_batch_encodes_to_the_same_bits_with_and_without_slicing(make_vae):
    vae, pixels = make_vae(), random_pixels(5, batch=2)
    assert torch.equal(encode_in_chunks(vae, pixels, [1, 4]), encode_whole(vae, pixels))
    whole = encode_in_chunks(vae, pixels, [1, 4])
    vae.enable_slicing()
    torch.testing.assert_close(encode_whole(vae, pixels), whole, atol=1e-6, rtol=0)


@every_exact_vae
def test_a_reset_begins_encoding_another_video(make_vae):
    vae, second = make_vae(), random_pixels(5, 16, 16, seed=2)
    encoder = StreamingEncoder(vae)
    encoder.encode(random_pixels(5))
    encoder.reset()
    assert torch.equal(encoder.encode(second), encode_whole(vae, second))


@every_exact_vae
def test_the_vae_is_free_for_other_uses_between_encoded_chunks(make_vae):
    vae, pixels = make_vae(), random_pixels(9)
    encoder, parts = StreamingEncoder(vae), []
    for chunk in pixels.split([5, 4], dim=2):
        parts.append(encoder.encode(chunk))
        encode_whole(vae, random_pixels(5, seed=3))
        decode_whole(vae, random_latents(2))
    assert torch.equal(torch.cat(parts, dim=2), encode_whole(vae, pixels))


@pytest.mark.parametrize("frames", [0, 2, 4, 8])
def test_the_first_frames_must_be_one_and_fours(frames):
    with pytest.raises(ValueError, match=rf"Expected 1 \+ 4 n frames, got {frames}"):
        StreamingEncoder(tiny_vae()).encode(random_pixels(frames))


@pytest.mark.parametrize("frames", [0, 1, 5, 6])
def test_later_frames_must_be_fours(frames):
    encoder = StreamingEncoder(tiny_vae())
    encoder.encode(random_pixels(5))
    with pytest.raises(ValueError, match=rf"Expected 4 n frames, got {frames}"):
        encoder.encode(random_pixels(frames))


@pytest.mark.parametrize("shape", [(1, 3, 32, 48), (1, 4, 1, 32, 48)], ids=["4 axes", "4 channels"])
def test_pixels_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match=r"Expected pixels \[B, 3, frames, H, W\], got shape"):
        StreamingEncoder(tiny_vae()).encode(torch.zeros(shape))


@pytest.mark.parametrize("changed", [{"batch": 2}, {"height": 16}, {"width": 32}])
def test_frames_of_another_size_than_the_last_raise(changed):
    encoder = StreamingEncoder(tiny_vae())
    encoder.encode(random_pixels(1))
    with pytest.raises(ValueError, match=r"\(1, 32, 48\), these frames .*`reset\(\)` first"):
        encoder.encode(random_pixels(4, **changed))


# -- statistics of the latents ---------------------------------------------------------------------------------------


def test_normalising_uses_the_statistics_of_the_vae_and_can_be_undone():
    vae, latents = tiny_vae(), random_latents(2)
    normalized = normalize_latents(vae, latents)
    for channel in range(Z_DIM):  # the tiny VAE has mean 0.1 c and deviation 1 + 0.05 c
        expected = (latents[:, channel] - 0.1 * channel) / (1 + 0.05 * channel)
        torch.testing.assert_close(normalized[:, channel], expected, atol=1e-6, rtol=0)
    mean, std = latent_statistics(vae, latents.device)
    torch.testing.assert_close(normalized * std + mean, latents, atol=1e-6, rtol=0)


# -- memory ----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made within it that are still alive, and the most that there ever were."""

    def __init__(self):
        super().__init__()
        self.peak, self._sizes = 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, result)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._sizes[storage] = storage.nbytes()


@functools.cache
def peak_of_decoding(chunks: int, *, whole: bool) -> int:
    vae = tiny_vae()
    decoder = StreamingDecoder(vae)
    with LiveBytes() as memory:
        if whole:
            decode_whole(vae, random_latents(2 * chunks))
        else:
            for number in range(chunks):
                decoder.decode(random_latents(2, seed=number))
    return memory.peak


@functools.cache
def peak_of_encoding(groups: int, *, whole: bool) -> int:
    vae = tiny_vae()
    encoder = StreamingEncoder(vae)
    with LiveBytes() as memory:
        if whole:
            encode_whole(vae, random_pixels(1 + 4 * groups))
        else:
            for number in range(1 + groups):
                encoder.encode(random_pixels(4 if number else 1, seed=number))
    return memory.peak


@pytest.mark.parametrize("peak", [peak_of_decoding, peak_of_encoding])
def test_memory_does_not_depend_on_the_length_of_the_video(peak):
    assert peak(12, whole=False) == peak(4, whole=False)


@pytest.mark.parametrize("peak", [peak_of_decoding, peak_of_encoding])
def test_the_whole_at_once_needs_more_the_longer_it_is(peak):
    """Which also shows that the measurement would notice."""
    assert peak(12, whole=True) > 1.5 * peak(4, whole=True)
    assert peak(12, whole=True) > peak(12, whole=False)


def test_a_reset_frees_the_memory_of_a_video():
    vae = tiny_vae()
    decoder, weights = StreamingDecoder(vae), {parameter.data_ptr() for parameter in vae.parameters()}
    with LiveBytes() as memory:
        decoder.decode(random_latents(2))
        before = [storage for storage in memory._sizes if storage.data_ptr() not in weights]
        decoder.reset()
        assert len(before) > 10
        del before
    assert [size for storage, size in memory._sizes.items() if storage.data_ptr() not in weights] == []


@pytest.mark.parametrize("wrong", [None, [1.0], torch.zeros(1, 4, 1, 4, 4, dtype=torch.long)])
def test_what_are_no_latents_is_refused(wrong):
    channels = tiny_vae().config.z_dim
    if isinstance(wrong, torch.Tensor):
        wrong = wrong[:, :1].expand(1, channels, 1, 4, 4)
    with pytest.raises(ValueError, match="Expected latents"):
        StreamingDecoder(tiny_vae()).decode(wrong)


def test_a_vae_may_be_converted_in_mid_video():
    vae = tiny_vae()
    decoder = StreamingDecoder(vae)
    chunk = torch.randn(1, vae.config.z_dim, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    decoder.decode(chunk)
    vae.to(torch.bfloat16)
    assert decoder.decode(chunk.bfloat16()).isfinite().all()


# -- errors in the middle --------------------------------------------------------------------------------------------


class OutOfMemory:
    """Out of memory in one of the calls of something, as in `OutOfMemory(2)` for the second; then not any more."""

    def __init__(self, call: int = 1):
        self.calls_left = call

    def __call__(self, *_):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise torch.OutOfMemoryError("no memory is left")


def assert_torn(call, reset, expected: torch.Tensor) -> None:
    """A call that runs out of memory is refused until a reset, and gives then what it should."""
    with pytest.raises(torch.OutOfMemoryError):
        call()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"An error has ended the call before.*`reset\(\)` first"):
            call()
    reset()
    assert torch.equal(call(), expected)


DECODER_PARTS = {"at first": "post_quant_conv", "in the middle": "decoder.mid_block", "at last": "decoder.conv_out"}


@pytest.mark.parametrize("part", DECODER_PARTS.values(), ids=DECODER_PARTS)
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_after_an_error_in_the_first_chunk_decoding_begins_again(part, tiled):
    vae, latents = tiny_vae(), random_latents(2, 4, 4)
    if tiled:
        enable_small_tiles(vae)
    vae.get_submodule(part).register_forward_pre_hook(OutOfMemory())
    twin = tiny_vae()
    twin.get_submodule(part).register_forward_pre_hook(lambda *_: None)  # computed by the same modules
    if tiled:
        enable_small_tiles(twin)
    decoder = StreamingDecoder(vae)
    assert_torn(lambda: decoder.decode(latents), decoder.reset, StreamingDecoder(twin).decode(latents))


def test_after_an_error_between_the_frames_of_a_chunk_decoding_begins_again(monkeypatch):
    vae, latents = tiny_vae(), random_latents(2)
    expected, decoder, out_of_memory = StreamingDecoder(vae).decode(latents), StreamingDecoder(vae), OutOfMemory(2)
    decode_frames = streaming_vae.decode_frames

    def decode(*arguments):
        out_of_memory()
        return decode_frames(*arguments)

    monkeypatch.setattr(streaming_vae, "decode_frames", decode)
    assert_torn(lambda: decoder.decode(latents), decoder.reset, expected)


def test_after_an_error_in_a_later_chunk_decoding_does_not_go_on():
    vae, latents = tiny_vae(), random_latents(4)
    decoder = StreamingDecoder(vae)
    decoder.decode(latents[:, :, :2])
    vae.post_quant_conv.register_forward_pre_hook(OutOfMemory())
    expected = StreamingDecoder(tiny_vae()).decode(latents[:, :, 2:])
    assert_torn(lambda: decoder.decode(latents[:, :, 2:]), decoder.reset, expected)


def test_latents_of_another_shape_leave_the_video_as_it_was():
    decoder, latents = StreamingDecoder(tiny_vae()), random_latents(2)
    with pytest.raises(ValueError, match="got shape"):
        decoder.decode(latents[:, :3])
    decoder.decode(latents)
    with pytest.raises(ValueError, match="this chunk"):
        decoder.decode(latents[..., :2])
    assert decoder.decode(latents).shape[2] == 8


ENCODER_PARTS = {"at first": "encoder.conv_in", "between": "encoder.conv_out", "at last": "quant_conv"}


@pytest.mark.parametrize("part", ENCODER_PARTS.values(), ids=ENCODER_PARTS)
def test_after_an_error_encoding_begins_again(part):
    vae, pixels = tiny_vae(), random_pixels(5)
    expected = StreamingEncoder(vae).encode(pixels)
    vae.get_submodule(part).register_forward_pre_hook(OutOfMemory())
    encoder = StreamingEncoder(vae)
    assert_torn(lambda: encoder.encode(pixels), encoder.reset, expected)
