"""The model that a server streams from, and what a client's `start` asks of it."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..frame_counts import chunks_to_cover, pixel_frames
from ..limits import FPS
from ..models.tiny_decoder import TinyVideoDecoder
from ..pipelines.inputs import ModelSizes, resolve_size
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..video.fit import fit, size_like, size_within
from .data_url import decode_image
from .messages import Start
from .sessions import Sessions
from .settings import ServeSettings


@dataclass(frozen=True)
class StreamPlan:
    """
    What one stream is made with, checked.

    Args:
        pipeline: The name of the pipeline that makes it, among those of [`ServedModel`].
        height, width: The size of its frames.
        seed: The seed of its noise.
        options: The other arguments of `LongLivePipeline.stream`.
    """

    pipeline: str | None
    height: int
    width: int
    seed: int
    options: dict[str, Any]


class ServedModel:
    """
    The pipelines that a server streams from.

    Args:
        name: What clients are told about the model; no path.
        pipelines: The pipeline, by the name None; beside it, versions of it that are meant for certain settings, such
            as those with a LoRA for a number of steps added for good. They share what they do not change.
        choose: Chooses one of them by the number of steps and the guidance scale.
        decoder: Makes the frames in place of the VAE, or None.
        kv_cache_dtype: What keys and values are stored as; None for the network's dtype.

    Attributes:
        sessions: The sessions that are made with them.
    """

    def __init__(
        self,
        name: str,
        pipelines: dict[str | None, LongLivePipeline],
        choose: Callable[[int, float], str | None] = lambda steps, guidance_scale: None,
        *,
        decoder: TinyVideoDecoder | None = None,
        kv_cache_dtype: str | None = None,
    ):
        self.kv_cache_dtype = kv_cache_dtype
        self.name, self.pipelines, self._choose = name, pipelines, choose
        self.sessions = Sessions(pipelines, decoder)

    @property
    def pipeline(self) -> LongLivePipeline:
        """The pipeline without additions."""
        return self.pipelines[None]

    @property
    def device(self) -> torch.device:
        """The device that makes the streams."""
        return self.pipeline.transformer.device

    def plan(self, start: Start, settings: ServeSettings) -> StreamPlan:
        """
        Check what a client asks for.

        Raises:
            ValueError: If the model cannot make it, or the server does not allow it; the text is for the client.
        """
        sizes, image = self.pipeline.sizes, None
        height, width = start.height, start.width
        chosen_here = height is None and width is None
        default = default_size(sizes, settings.max_pixels)
        most = settings.max_pixels or default[0] * default[1]
        if start.image is not None:
            image = decode_image(start.image)
            height, width = size_like((image.height, image.width), default, token_size(sizes), height, width)
        elif chosen_here:
            height, width = default
        size = resolve_size(height, width, {}, sizes.sample_size, sizes.spatial_scale, sizes.patch_size)
        height, width = size.height, size.width
        if image is not None:
            image = fit(image, height, width)  # as the pipeline would; a large picture is not to be kept
        if height * width > most and not chosen_here:
            raise ValueError(f"height x width is {height} x {width} = {height * width}; at most {most} are allowed.")
        steps = settings.steps if start.steps is None else start.steps
        if steps > settings.max_steps:
            raise ValueError(f"steps is {steps}; at most {settings.max_steps} are allowed.")
        guidance_scale = settings.guidance_scale if start.guidance_scale is None else start.guidance_scale
        copy.deepcopy(self.pipeline.scheduler).set_timesteps(steps)  # raises where it cannot solve
        options = {
            "prompt": start.prompt,
            "image": image,
            "height": height,
            "width": width,
            "num_frames": None if start.seconds is None else self._whole_frames(start.seconds),
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "window_size": settings.window_size,
            "sink_size": settings.sink_size,
            "kv_cache_dtype": self.kv_cache_dtype,
            "clean_pass": settings.clean_pass,
            "attention_density": settings.attention_density,
            "split_first_chunk": settings.split_first_chunk,
            "output_type": "uint8",
        }
        seed = random.randrange(2**31) if start.seed is None else start.seed
        return StreamPlan(self._choose(steps, guidance_scale), height, width, seed, options)

    def _whole_frames(self, seconds: float) -> int:
        """Return the frames of as many chunks as it takes."""
        sizes, frames = self.pipeline.sizes, max(1, round(seconds * FPS))
        num_chunks = chunks_to_cover(frames, sizes.chunk_size, temporal_scale=sizes.temporal_scale)
        return pixel_frames(num_chunks * sizes.chunk_size, temporal_scale=sizes.temporal_scale)


def default_size(sizes: ModelSizes, max_pixels: int | None) -> tuple[int, int]:
    """
    Return the height and width of a stream that asks for none: those that the model was made for, or, if the server
    allows fewer pixels, smaller ones of the same shape.

    Raises:
        ValueError: If it allows less than a picture.
    """
    height, width = sizes.sample_size[0] * sizes.spatial_scale, sizes.sample_size[1] * sizes.spatial_scale
    return (height, width) if max_pixels is None else size_within(max_pixels, (height, width), token_size(sizes))


def token_size(sizes: ModelSizes) -> tuple[int, int]:
    """Return the height and width of what a token stands for, in pixels."""
    return sizes.patch_size[0] * sizes.spatial_scale, sizes.patch_size[1] * sizes.spatial_scale
