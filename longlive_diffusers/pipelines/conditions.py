"""The images and videos that a video begins with, converted from what a caller has to pixels in [-1, 1]."""

import numpy as np
import PIL.Image
import torch
from diffusers.utils import logging
from diffusers.video_processor import VideoProcessor

from ..frame_counts import pixel_frames, whole_chunks


logger = logging.get_logger(__name__)


def check_conditions(**conditions: object) -> None:
    """Raise a ValueError if more than one condition is given: a video begins with an image or continues another
    one."""
    names = [name for name, value in conditions.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"Pass at most one of {', '.join(f'`{name}`' for name in conditions)}, got {names}.")


def image_to_pixels(image, processor: VideoProcessor, height: int, width: int) -> torch.Tensor:
    """Convert a PIL image, array `[H, W, 3]` or tensor `[3, H, W]`, or a batch of them, to pixels
    `[B, 3, 1, height, width]` in [-1, 1], resized."""
    images = image if isinstance(image, list) else [image]
    if not images:
        raise ValueError("`image` is an empty list.")
    pixels = [processor.preprocess(_as_pixels("image", item), height, width) for item in images]
    return torch.cat(pixels).unsqueeze(2)


def video_to_pixels(
    video, processor: VideoProcessor, height: int, width: int, chunk_size: int, temporal_scale: int
) -> torch.Tensor:
    """Convert a list of PIL images, array `[F, H, W, 3]` or tensor `[F, 3, H, W]`, or a batch of them, to pixels
    `[B, 3, F, height, width]` in [-1, 1], resized and cut to whole chunks."""
    if isinstance(video, list) and video and isinstance(video[0], PIL.Image.Image):
        video = [video]
    videos = video if isinstance(video, list) else list(video) if _ndim(video) == 5 else [video]
    if not videos:
        raise ValueError("`video` is an empty list.")
    pixels = []
    for item in videos:
        frames = item if isinstance(item, list) else [item]
        parts = [processor.preprocess(_as_pixels("video", part), height, width) for part in frames]
        pixels.append(torch.cat(parts).transpose(0, 1))
    lengths = {item.shape[1] for item in pixels}
    if len(lengths) > 1:
        raise ValueError(f"The videos of a batch must have the same number of frames, got {sorted(lengths)}.")
    total = lengths.pop()
    num_chunks = whole_chunks(total, chunk_size, temporal_scale=temporal_scale)
    kept = pixel_frames(num_chunks * chunk_size, temporal_scale=temporal_scale)
    if num_chunks == 0:
        needed = pixel_frames(chunk_size, temporal_scale=temporal_scale)
        raise ValueError(f"`video` has {total} frames; a chunk of {chunk_size} latent frames needs {needed}.")
    if kept != total:
        logger.warning(f"`video` has {total} frames; continuing its last {kept} ({num_chunks} whole chunks).")
    return torch.stack([item[:, total - kept :] for item in pixels])


def _ndim(value) -> int | None:
    return value.ndim if isinstance(value, np.ndarray | torch.Tensor) else None


def _as_pixels(name: str, value):
    """Convert a value to what `VideoProcessor.preprocess` understands; uint8 becomes fractions of 255."""
    if isinstance(value, PIL.Image.Image):
        return value.convert("RGB")
    if not isinstance(value, np.ndarray | torch.Tensor):
        raise ValueError(f"`{name}` must hold PIL images, arrays or tensors, got {type(value).__name__}.")
    channels = value.shape[-1] if isinstance(value, np.ndarray) else value.shape[-3] if value.ndim >= 3 else 0
    if value.ndim not in (3, 4) or channels != 3 or 0 in value.shape:
        expected = "[(F,) H, W, 3]" if isinstance(value, np.ndarray) else "[(F,) 3, H, W]"
        raise ValueError(f"`{name}` must be {expected}, got shape {tuple(value.shape)}.")
    if isinstance(value, np.ndarray):
        value = value.astype(np.float32) / 255 if value.dtype == np.uint8 else value.astype(np.float32)
        finite = bool(np.isfinite(value).all())
    else:
        value = value.float() / 255 if value.dtype == torch.uint8 else value.float()
        finite = bool(torch.isfinite(value).all())
    if not finite:
        raise ValueError(f"`{name}` has values that are not finite.")
    return value[None] if value.ndim == 3 else value
