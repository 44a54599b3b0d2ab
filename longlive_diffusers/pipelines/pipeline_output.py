"""What the pipeline returns, and what a stream yields."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from .stopwatch import Stopwatch


Frames = torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]


@dataclass
class LongLivePipelineOutput(BaseOutput):
    """
    The output of [`LongLivePipeline`].

    Args:
        frames: The videos: `np.ndarray [B, frames, height, width, 3]` in [0, 1] (`output_type="np"`) or of bytes
            ("uint8"), tensor `[B, frames, 3, height, width]` in [0, 1] ("pt"), lists of images ("pil"), or normalized
            latents `[B, C, F, h, w]` ("latent").
    """

    frames: Frames


@dataclass(frozen=True)
class VideoChunk:
    """
    One chunk of a stream.

    Args:
        frames: Its frames, in the layout of the stream's `output_type`.
        latents: Its normalized latents, `[B, C, chunk_size, h, w]`, float32. The stream goes on from them: they are
            to be copied, not changed.
        index: The index of the chunk in the video, from 0.
        shot_index: The index of the shot, from 0; a list where a batch of videos is streamed.
        prompt: The shot's prompt, without the scene-cut prefix; a list where a batch is streamed. None where
            embeddings were passed.
        start_frame: The index of its first frame in the video, from 0.
        part, num_parts: Which part of the chunk this is, of how many; a chunk is one part, except for the first one
            with `split_first_chunk`. Frames and latents are those of the part.
        denoise_stopwatch, decode_stopwatch: What `denoise_seconds` and `decode_seconds` are read from; None is 0.
    """

    frames: Frames
    latents: torch.Tensor
    index: int
    shot_index: int | list[int]
    prompt: str | list[str | None] | None
    start_frame: int
    part: int = 0
    num_parts: int = 1
    denoise_stopwatch: Stopwatch | None = field(default=None, repr=False, compare=False)
    decode_stopwatch: Stopwatch | None = field(default=None, repr=False, compare=False)

    @property
    def is_complete(self) -> bool:
        """Whether all of the chunk's frames have been handed over, with this."""
        return self.part == self.num_parts - 1

    @property
    def denoise_seconds(self) -> float:
        """How long the device worked from the beginning of the chunk to its latents: encoding a prompt that is new,
        rewriting the history under it, the solver's steps and the callbacks between them. Not in it is the clean pass,
        which comes after the latents; and of a chunk in parts, the first part has all of it. Of a video that is
        continued, the chunks are there, and take next to nothing.
        On a GPU, this waits until the chunk's latents are there."""
        return 0.0 if self.denoise_stopwatch is None else self.denoise_stopwatch.seconds

    @property
    def decode_seconds(self) -> float:
        """How long it took from the latents to the frames in the layout that was asked for, with the copy to the host
        if they are there; 0 for "latent". With `async_decode`, another chunk is denoised meanwhile, which makes both
        take longer. On a GPU, this waits until the frames are there."""
        return 0.0 if self.decode_stopwatch is None else self.decode_stopwatch.seconds


def check_numbers(frames: torch.Tensor | np.ndarray) -> None:
    """Raise a ValueError if frames (see [`VideoChunk`], neither PIL images nor bytes) have infinities or NaN. A tensor
    on a GPU is not read, which would have to wait for it. Of an array, one pixel of 16x16 is: a latent that is not a
    number spoils more than that."""
    if isinstance(frames, np.ndarray):
        sound = np.isfinite(frames[:, :, ::16, ::16]).all()
    else:
        sound = frames.device.type != "cpu" or torch.isfinite(frames).all()
    check_sound(bool(sound))


def check_sound(sound: bool) -> None:
    """Raise a ValueError if frames turned out to be not `sound`: to have values that are not numbers."""
    if not sound:
        raise ValueError(
            "A chunk came out with values that are not numbers: a callback returned them, or numbers became too large "
            "for the dtype of a model; float16 ends at 65504."
        )


def join_frames(chunks: list[Any], output_type: str) -> Frames:
    """Join the chunks of a video, each with frames in the layout of `output_type`."""
    if output_type in ("np", "uint8"):
        return np.concatenate(chunks, axis=1)
    if output_type == "pil":
        return [[image for part in video for image in part] for video in zip(*chunks, strict=True)]
    return torch.cat(chunks, dim=2 if output_type == "latent" else 1)
