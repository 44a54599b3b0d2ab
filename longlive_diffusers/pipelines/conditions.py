"""The images and videos that a video begins with, converted from what a caller has to pixels in [-1, 1].

Pictures of another shape than the video are resized to cover it and cropped at the center, as in training.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
import torch
from diffusers.utils import logging

from ..frame_counts import pixel_frames, whole_chunks
from ..tensor_checks import check_plain
from ..video.fit import fit
from ..video.images import as_rgb
from ..video.levels import white_level


logger = logging.get_logger(__name__)


def check_conditions(**conditions: object) -> None:
    """Raise a ValueError if more than one condition is given: a video begins with an image or continues another
    one."""
    names = [name for name, value in conditions.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"Pass at most one of {', '.join(f'`{name}`' for name in conditions)}, got {names}.")


def image_to_pixels(image, height: int, width: int) -> torch.Tensor:
    """
    Convert an image, or a batch of them, to pixels `[B, 3, 1, height, width]` in [-1, 1].

    Args:
        image: A PIL image (see `video.images.as_rgb`), an array `[H, W, 3]` or a tensor `[3, H, W]` (see
            `video.levels.white_level`); a list of these, or an array or tensor with one more dimension, is a batch.
        height, width: The size of the pixels.

    Raises:
        ValueError: For anything else; the message states shape or type.
    """
    images = list(image) if isinstance(image, list | tuple) else [image]
    if not images:
        raise ValueError("`image` is an empty list.")
    frames = _frames("image", images)
    return _to_pixels("image", frames, height, width).transpose(0, 1).unsqueeze(2)


def video_to_pixels(video, height: int, width: int, chunk_size: int, temporal_scale: int) -> torch.Tensor:
    """
    Convert a video, or a batch of them, to pixels `[B, 3, F, height, width]` in [-1, 1], cut to whole chunks.

    Args:
        video: A list of frames, each one as in [`image_to_pixels`], or an array `[F, H, W, 3]` or tensor
            `[F, 3, H, W]`; a list of these, or an array or tensor with one more dimension, is a batch.
        height, width: The size of the pixels.
        chunk_size: The number of latent frames in a chunk.
        temporal_scale: The number of pixel frames that a latent frame stands for.

    Raises:
        ValueError: For anything else, also for videos of different lengths or less than a chunk; the message states
            the numbers.
    """
    videos = [_frames("video", frames) for frames in _split_videos(video)]
    lengths = {len(frames) for frames in videos}
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
    return torch.stack([_to_pixels("video", frames, height, width, skip=total - kept) for frames in videos])


def _split_videos(video) -> list[Sequence]:
    """Split a batch into videos, each of them a sequence of frames or of arrays of frames."""
    if isinstance(video, PIL.Image.Image) or _ndim(video) in (2, 3):
        raise ValueError(
            f"`video` is a single picture, {_describe(video)}: a video is a list of them; or pass `image`."
        )
    if not isinstance(video, list | tuple):
        return [[part] for part in video] if _ndim(video) == 5 else [[video]]
    if not video:
        raise ValueError("`video` is an empty list.")
    if any(isinstance(part, list | tuple) or _ndim(part) == 4 for part in video):
        return [part if isinstance(part, list | tuple) else [part] for part in video]
    return [video]


def _ndim(value) -> int | None:
    return value.ndim if isinstance(value, np.ndarray | torch.Tensor) else None


def _describe(value) -> str:
    """Describe a value in a message, by its shape or its type."""
    return f"shape {tuple(value.shape)}" if _ndim(value) is not None else type(value).__name__


Frames = list[PIL.Image.Image | np.ndarray]


def _frames(name: str, values: Iterable) -> Frames:
    """Return frames one by one: PIL images, or arrays `[H, W, 3]` of any dtype.

    Args:
        name: The name of the argument that they are from.
        values: PIL images, arrays `[(F,) H, W, 3]` and tensors `[(F,) 3, H, W]`.
    """
    frames: Frames = []
    for value in values:
        if isinstance(value, PIL.Image.Image):
            if 0 in value.size:
                raise ValueError(f"`{name}` has a picture of {value.height}x{value.width} pixels.")
            frames.append(value)
        elif isinstance(value, np.ndarray | torch.Tensor):
            if isinstance(value, torch.Tensor):
                check_plain(f"`{name}`", value)
            frames += list(_channels_last(name, value))
        else:
            raise ValueError(f"`{name}` must hold PIL images, arrays or tensors, got {type(value).__name__}.")
    return frames


def _channels_last(name: str, value: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return an array or a tensor of pictures as an array `[F, H, W, 3]`."""
    is_array = isinstance(value, np.ndarray)
    channels = value.shape[-1 if is_array else -3] if value.ndim in (3, 4) else None
    if channels != 3 or 0 in value.shape:
        expected = "[(F,) H, W, 3]" if is_array else "[(F,) 3, H, W]"
        raise ValueError(f"`{name}` must be {expected}, got shape {tuple(value.shape)}.")
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.is_floating_point() and value.dtype != torch.float64:
            value = value.float()  # NumPy has no bfloat16
        value = value.movedim(-3, -1).numpy()
    return value if value.ndim == 4 else value[None]


def _to_pixels(name: str, frames: Frames, height: int, width: int, skip: int = 0) -> torch.Tensor:
    """Convert frames that belong together to pixels `[3, F, height, width]` in [-1, 1], without the first `skip`."""
    arrays = [frame for frame in frames if isinstance(frame, np.ndarray)]
    # Of all frames together: a fade to black in 16 bits must not turn into 8 bits on its way.
    whites = {
        dtype: white_level(f"`{name}`", [array for array in arrays if array.dtype == dtype])
        for dtype in {array.dtype for array in arrays}
    }
    pixels = torch.empty(3, len(frames) - skip, height, width, dtype=torch.float32)
    for index, frame in enumerate(frames[skip:]):
        white = whites[frame.dtype] if isinstance(frame, np.ndarray) else 255.0
        fractions = torch.from_numpy(_fit(frame, white, height, width))
        pixels[:, index] = fractions.permute(2, 0, 1).mul_(2).sub_(1)
    return pixels


def _fit(frame: PIL.Image.Image | np.ndarray, white: float, height: int, width: int) -> np.ndarray:
    """Resize and crop a frame; return float32 `[height, width, 3]` in [0, 1]."""
    if isinstance(frame, PIL.Image.Image) or white == 255:
        image = as_rgb(frame) if isinstance(frame, PIL.Image.Image) else PIL.Image.fromarray(frame.astype(np.uint8))
        return np.array(fit(image, height, width)).astype(np.float32) / 255
    # More than 8 bits: Pillow resizes them one channel at a time.
    channels = (frame / white).astype(np.float32).clip(0, 1).transpose(2, 0, 1)
    fitted = [np.asarray(fit(PIL.Image.fromarray(channel), height, width)) for channel in channels]
    return np.stack(fitted, axis=-1).clip(0, 1)
