"""The image or video that a video begins with, read from the file named on the command line, and the size it gives."""

import argparse
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from PIL import Image

from ..frame_counts import chunks_to_cover, pixel_frames
from ..pipelines.inputs import ModelSizes
from ..video.decoding import BreaksOffError, open_video
from ..video.display import Display
from ..video.fit import size_like
from ..video.images import read_image
from ..video.reader import sampled_frames
from .choices import FPS


@dataclass(frozen=True)
class Beginning:
    """
    Args:
        image: The image that becomes the first frame, or None.
        video: The frames of the video to continue, uint8 [H, W, 3], at the model's rate, or None.
        height, width: The size of the video; None for the model's own.
        notes: What the user should know about it, a line each.
    """

    image: Image.Image | None = None
    video: list[np.ndarray] | None = None
    height: int | None = None
    width: int | None = None
    notes: list[str] = field(default_factory=list)


def read_beginning(args: argparse.Namespace, sizes: ModelSizes, num_frames: int | None) -> Beginning:
    """
    Read `--image` or `--video`, if there is one.

    Args:
        args: The arguments; `height` and `width` fit the model.
        sizes: The sizes of the model.
        num_frames: How many frames the user asked for, if that is known. Of a video that has as many, no more are
            read: it leaves nothing to add.

    Raises:
        ValueError: If the file cannot be read.
    """
    if args.image:
        image = read_image(args.image)
        height, width, notes = _choose_size(args, args.image, (image.height, image.width), sizes)
        return Beginning(image, None, height, width, notes)
    if not args.video:
        return Beginning(height=args.height, width=args.width)
    limit = None
    if num_frames is not None:
        num_chunks = chunks_to_cover(num_frames, sizes.chunk_size, temporal_scale=sizes.temporal_scale)
        limit = pixel_frames(num_chunks * sizes.chunk_size, temporal_scale=sizes.temporal_scale)
    with open_video(args.video) as video:
        shown = Display(video)
        height, width, notes = _choose_size(args, args.video, (shown.height, shown.width), sizes)
        rate = video.stated_rate
        fps = rate if rate and abs(rate - FPS) < 0.1 else Fraction(FPS)  # 23.976 is meant to be 24
        frames: list[np.ndarray] = []
        try:
            for frame in sampled_frames(video, fps, height, width, limit=limit):
                frames.append(frame)
        except BreaksOffError as error:
            notes.append(f"{error}; it is continued from there")
    return Beginning(None, frames, height, width, notes)


def _choose_size(
    args: argparse.Namespace, path: str, shape: tuple[int, int], sizes: ModelSizes
) -> tuple[int, int, list[str]]:
    """Return the height and width of the video, and a line about them unless they are the model's or asked for."""
    scale = sizes.spatial_scale
    default = (sizes.sample_size[0] * scale, sizes.sample_size[1] * scale)
    step = (sizes.patch_size[0] * scale, sizes.patch_size[1] * scale)
    height, width = size_like(shape, default, step, args.height, args.width)
    if (height, width) in (default, (args.height, args.width)):
        return height, width, []
    note = (
        f"the video is {width}x{height} (width x height), the shape of '{path}' ({shape[1]}x{shape[0]}); "
        "--height and --width choose another size"
    )
    return height, width, [note]
