"""`output_type="uint8"`: the bytes that a video file gets, made where frames are decoded."""

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from longlive_diffusers import VideoWriter
from longlive_diffusers.pipelines.bytes_on_host import HostCopier, to_bytes
from longlive_diffusers.pipelines.decoder import ChunkDecoder
from tests.support.fake_cuda_streams import FakeStream, put_in_place
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


EDGES = torch.arange(256, dtype=torch.float32) / 255


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize(
    "values",
    [
        EDGES,
        (torch.arange(255) + 0.5) / 255,  # halfway between two levels
        (torch.arange(255) + 0.5) / 255 + 1e-7,
        torch.rand(3000, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.0, -0.0, 1.0, 1e-30]),
    ],
    ids=["levels", "halves", "just above halves", "random", "ends"],
)
def test_bytes_are_those_that_a_writer_makes_of_floats(values):
    pixels = values.repeat(12).view(1, 2, 3, 2, -1)
    floats = pixels.permute(0, 1, 3, 4, 2)[0].numpy()
    made = to_bytes(pixels)
    assert made.dtype == torch.uint8 and made.shape == (1, 2, 2, len(values), 3) and made.is_contiguous()
    for frame, own in zip(floats, made[0].numpy(), strict=True):
        np.testing.assert_array_equal(own, np.rint(frame.clip(0.0, 1.0) * np.float32(255)))


VIDEOS = {
    "one video": {},
    "a batch": {"prompt": ["a cat", "a dog"], "generator": [torch.Generator().manual_seed(i) for i in (0, 1)]},
    "one chunk": {"num_frames": 5},
    "asynchronous": {"async_decode": True},
    "continued": {"video_latents": torch.randn(1, 8, 2, 4, 4, generator=torch.Generator().manual_seed(3))},
}


def fresh(overrides: dict) -> dict:
    """The arguments, with generators as they were in the beginning."""
    for generator in overrides.get("generator", []):
        generator.manual_seed(generator.initial_seed())
    return tiny_arguments(**overrides)


@pytest.mark.parametrize(
    ("special", "video"),
    [
        *(("", video) for video in VIDEOS),
        *(("tiling", video) for video in ("a batch", "continued")),
        *(("slicing", video) for video in ("a batch", "asynchronous")),
        *(("bfloat16", video) for video in ("one video", "asynchronous")),
    ],
)
def test_a_stream_of_bytes_is_the_stream_of_floats(pipe, video, special):
    overrides = VIDEOS[video]
    if special == "tiling":
        pipe.vae.enable_tiling(32, 32, 16, 16)
    elif special == "slicing":
        pipe.vae.enable_slicing()
    elif special == "bfloat16":
        pipe.vae.to(torch.bfloat16)
    with pipe.stream(**{**fresh(overrides), "output_type": "np"}) as session:
        floats = [chunk.frames for chunk in session]
    with pipe.stream(**{**fresh(overrides), "output_type": "uint8"}) as session:
        chunks = [chunk.frames for chunk in session]
    for own, expected in zip(chunks, floats, strict=True):
        assert isinstance(own, np.ndarray) and own.dtype == np.uint8 and own.shape == expected.shape
        np.testing.assert_array_equal(own, np.rint(expected * np.float32(255)))


def test_a_whole_video_of_bytes(pipe):
    frames = pipe(**tiny_arguments(output_type="uint8")).frames
    floats = pipe(**tiny_arguments(output_type="np")).frames
    assert frames.dtype == np.uint8 and frames.shape == (1, 13, 64, 64, 3)
    np.testing.assert_array_equal(frames, np.rint(floats * np.float32(255)))
    latents = pipe(**tiny_arguments(output_type="latent")).frames
    np.testing.assert_array_equal(pipe.decode_latents(latents, "uint8"), frames)


def test_the_file_is_the_same_to_the_byte(pipe, tmp_path):
    for output_type in ("np", "uint8"):
        with (
            pipe.stream(**tiny_arguments(output_type=output_type)) as session,
            VideoWriter(tmp_path / f"{output_type}.mp4") as writer,
        ):
            for chunk in session:
                writer.write(chunk.frames[0])
    assert (tmp_path / "np.mp4").read_bytes() == (tmp_path / "uint8.mp4").read_bytes()


@pytest.mark.parametrize("place", [(0, 0, 0, 0, 0), (0, 2, 3, 17, 30), (0, 1, 4, 63, 63)], ids=str)
def test_any_pixel_that_is_not_a_number_is_found(pipe, place, monkeypatch):
    """Bytes cannot show it, so that all pixels are looked at, not one of every 16x16."""
    decoder = ChunkDecoder(pipe.vae, VideoProcessor(), "uint8", torch.device("cpu"))
    pixels = torch.zeros(1, 3, 5, 64, 64)
    monkeypatch.setattr(decoder._decoder, "decode", lambda latents: pixels)
    assert (decoder.decode(torch.zeros(1, 8, 2, 4, 4)) == 128).all()
    pixels[place] = float("nan")
    with pytest.raises(ValueError, match="values that are not numbers"):
        decoder.decode(torch.zeros(1, 8, 2, 4, 4))


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says that it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))


@pytest.fixture
def pinned(monkeypatch) -> list[torch.Tensor]:
    """The pinned memory that was asked for."""
    put_in_place(monkeypatch)
    made, empty = [], torch.empty

    def ordinary(*shape, pin_memory=False, **options):
        tensor = empty(*shape, **options)
        if pin_memory:
            made.append(tensor)
        return tensor

    monkeypatch.setattr("torch.empty", ordinary)
    return made


def test_on_a_gpu_one_piece_of_pinned_memory_and_one_wait_serve_each_chunk(pinned, monkeypatch):
    waits = []
    monkeypatch.setattr(FakeStream, "synchronize", lambda stream: waits.append(stream), raising=False)
    copier, chunks, copies = HostCopier(), [], []
    for frames, sound in ((5, True), (8, True), (8, False), (8, True)):
        pixels = torch.randint(256, (1, frames, 4, 6, 3), dtype=torch.uint8)
        chunks.append(pixels.numpy())
        copied, is_sound = copier.copy(pixels.as_subclass(OnGpu), torch.tensor(sound))
        assert is_sound == sound
        copies.append(copied)
    assert [memory.numel() for memory in pinned] == [5 * 72 + 1, 8 * 72 + 1]
    assert len(waits) == 4
    for copied, chunk in zip(copies, chunks, strict=True):  # what was handed out first is still what it was
        np.testing.assert_array_equal(copied, chunk)
        assert not any(np.shares_memory(copied, memory.numpy()) for memory in pinned)
