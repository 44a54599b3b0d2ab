"""The frames of a clip as training takes them: at one rate and size, in memory that does not depend on its length.

How they are chosen and cropped is what `longlive_diffusers.video` does for a video that a user wants to continue.
"""

import os
from collections.abc import Iterator
from fractions import Fraction

import torch

from longlive_diffusers.video.decoding import open_video
from longlive_diffusers.video.reader import sampled_frames
from longlive_diffusers.video.sampling import at_rate


class ClipError(ValueError):
    """A clip cannot be read, or not as far as it has to be. The message names the file."""


def count_frames(path: str | os.PathLike, fps: Fraction, limit: int) -> int:
    """
    Return how many frames [`read_frames`] can yield, at most `limit`; this is found by decoding that far.

    Raises:
        ClipError: If it is not a video, or is damaged before that; the message says how much of it is sound.
    """
    try:
        with open_video(path) as video:
            return sum(1 for _ in at_rate(((None, frame.time) for frame in video.frames), fps, limit))
    except ValueError as error:
        raise ClipError(str(error)) from error


def read_frames(path: str | os.PathLike, fps: Fraction, count: int, height: int, width: int) -> Iterator[torch.Tensor]:
    """
    Yield the first `count` frames at `fps` frames per second, each uint8 `[3, height, width]`: upright, resized to
    cover that size, and cropped at the center.

    Raises:
        ClipError: If the clip cannot be read that far.
    """
    num_given = 0
    try:
        with open_video(path) as video:
            for frame in sampled_frames(video, fps, height, width, limit=count):
                num_given += 1
                yield torch.from_numpy(frame).permute(2, 0, 1)
    except ValueError as error:
        raise ClipError(str(error)) from error
    if num_given < count:
        raise ClipError(f"'{path}' has {num_given} frames at {float(fps):g} a second, but {count} are needed")
