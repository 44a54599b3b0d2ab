"""Read the frames of a clip at a given rate and size, in memory that does not depend on the clip's length.

A clip's own frames may come at any times (23.976 or 60 per second, or whenever a screen recorder had a new picture).
For each of the times 0, 1/fps, 2/fps, ... after the first frame, the nearest frame in time is taken; the last frame is
assumed to last as long as the one before it. So a clip that already has the requested rate is returned frame by frame.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TypeVar

import av
import numpy as np
import torch
from PIL import Image

from longlive_diffusers.video.reader import BreaksOffError, decode_frames, open_video, upright


Frame = TypeVar("Frame")


class ClipError(ValueError):
    """A clip cannot be read, or not as far as it has to be. The message names the file."""


def count_frames(path: str | os.PathLike, fps: Fraction, limit: int) -> int:
    """
    Return how many frames [`read_frames`] can yield, at most `limit`; this is found by decoding that far.

    Raises:
        ClipError: If it is not a video, or is damaged before that.
    """
    with contextlib.closing(_decode(path)) as frames:
        count = sum(1 for _ in at_rate(((None, time) for _, time, _ in frames), fps, limit))
    if not count:
        raise ClipError(f"'{path}' has no frame that can be decoded")
    return count


def read_frames(path: str | os.PathLike, fps: Fraction, count: int, height: int, width: int) -> Iterator[torch.Tensor]:
    """
    Yield the first `count` frames at `fps` frames per second, each uint8 `[3, height, width]`: rotated upright,
    resized to cover that size (antialiased, with regard to pixels that are not square), and cropped at the center.

    Raises:
        ClipError: If the clip cannot be read that far.
    """
    num_given, last, pixels = 0, None, None
    with contextlib.closing(_decode(path)) as frames:
        for frame, pixel_aspect in at_rate((((frame, aspect), time) for frame, time, aspect in frames), fps, count):
            if frame is not last:  # a slow clip gives one frame several times
                last, pixels = frame, _fit(frame, pixel_aspect, height, width)
            num_given += 1
            yield pixels
    if num_given < count:
        raise ClipError(f"'{path}' has {num_given} frames at {float(fps):g} a second, but {count} are needed")


def at_rate(frames: Iterable[tuple[Frame, Fraction]], fps: Fraction, limit: int) -> Iterator[Frame]:
    """
    Yield at most `limit` of `frames`, one for each of the times 0, 1/fps, 2/fps, ... after the first frame: the
    nearest one, or the earlier of two that are equally near. No more of `frames` are read than necessary. A frame that
    is not later than the one before it is skipped.

    Args:
        frames: The frames, each with its time in seconds.
        fps: The frames per second to yield.
        limit: The largest number of frames to yield.
    """
    num_given, start, last_time, gap = 0, None, Fraction(0), Fraction(0)
    last: Frame | None = None
    for frame, time in frames:
        if start is None:
            start, last = time, frame
        elif time - start > last_time:
            gap = time - start - last_time
            middle = last_time + gap / 2
            while num_given < limit and num_given / fps <= middle:
                yield last
                num_given += 1
            last, last_time = frame, time - start
        # Up to its own time, no later frame can be nearer.
        while num_given < limit and num_given / fps <= last_time:
            yield last
            num_given += 1
        if num_given >= limit:
            return
    if start is None:
        return
    total = max(1, math.floor((last_time + gap) * fps + Fraction(1, 2)))
    for _ in range(num_given, min(total, limit)):
        yield last


def _decode(path: str | os.PathLike) -> Iterator[tuple[av.VideoFrame, Fraction, Fraction]]:
    """Yield every frame, its time in seconds, and the aspect ratio of its pixels (width over height)."""
    num_frames, time = 0, Fraction(0)
    try:
        with open_video(path) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate
            for frame in decode_frames(container, stream):
                if frame.pts is not None:
                    time = frame.pts * (frame.time_base or stream.time_base)  # delayed frames have no time base
                elif not rate:
                    raise ClipError(f"'{path}' says neither its frame rate nor the times of its frames")
                elif num_frames:
                    time += 1 / rate
                yield frame, time, stream.sample_aspect_ratio or Fraction(1)
                num_frames += 1
    except BreaksOffError as error:
        raise ClipError(f"'{path}' is damaged or incomplete: it breaks off after {num_frames} frames") from error
    except ValueError as error:
        raise ClipError(str(error)) from error


def _fit(frame: av.VideoFrame, pixel_aspect: Fraction, height: int, width: int) -> torch.Tensor:
    """Return the largest centered part of the frame that has this shape, resized: uint8 `[3, height, width]`."""
    image = Image.fromarray(np.ascontiguousarray(upright(frame)))
    if round(frame.rotation / 90) % 2:
        pixel_aspect = 1 / pixel_aspect
    shape = float(Fraction(width, height) / pixel_aspect)  # of the part, in pixels of the frame
    part_width, part_height = min(image.width, image.height * shape), min(image.height, image.width / shape)
    left, top = (image.width - part_width) / 2, (image.height - part_height) / 2
    box = (left, top, left + part_width, top + part_height)
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
