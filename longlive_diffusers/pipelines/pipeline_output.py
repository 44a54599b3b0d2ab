"""What the pipeline returns, and what a stream yields."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


Frames = torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]


@dataclass
class LongLivePipelineOutput(BaseOutput):
    """
    The output of [`LongLivePipeline`].

    Args:
        frames: The videos: `np.ndarray [B, frames, height, width, 3]` in [0, 1] (`output_type="np"`), tensor
            `[B, frames, 3, height, width]` ("pt"), lists of images ("pil"), or normalized latents
            `[B, C, F, h, w]` ("latent").
    """

    frames: Frames


@dataclass(frozen=True)
class VideoChunk:
    """
    One chunk of a stream.

    Args:
        frames: Its frames, in the layout of the stream's `output_type`.
        latents: Its normalized latents, `[B, C, chunk_size, h, w]`, float32.
        index: The index of the chunk in the video, from 0.
        shot_index: The index of the shot, from 0; a list where a batch of videos is streamed.
        prompt: The shot's prompt, without the scene-cut prefix; a list where a batch is streamed. None where
            embeddings were passed.
        start_frame: The index of its first frame in the video, from 0.
    """

    frames: Frames
    latents: torch.Tensor
    index: int
    shot_index: int | list[int]
    prompt: str | list[str | None] | None
    start_frame: int


def join_frames(chunks: list[Any], output_type: str) -> Frames:
    """Join the chunks of a video, each with frames in the layout of `output_type`."""
    if output_type == "np":
        return np.concatenate(chunks, axis=1)
    if output_type == "pil":
        return [[image for part in video for image in part] for video in zip(*chunks, strict=True)]
    return torch.cat(chunks, dim=2 if output_type == "latent" else 1)
