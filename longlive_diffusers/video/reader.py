"""Read the frames of a video: at the times when they are shown, upright, resized and cropped, or just all of them.

A video's own frames may come at any times (23.976 or 60 per second, or whenever a screen recorder had a new picture).
What is not needed is dropped while the file is read, so memory grows only with the frames that are kept.
"""

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from ..number_checks import check_counts
from ..wording import counted
from .decoding import BreaksOffError, TimedFrame, Video, open_video
from .display import Display
from .sampling import at_rate


def sampled_frames(
    video: Video, fps: Fraction, height: int, width: int, *, limit: int | None = None
) -> Iterator[np.ndarray]:
    """
    Yield the frames of an open video at a constant rate (see `sampling.at_rate`), resized to cover a size and cropped
    at the center.

    Args:
        video: The open video; it can be read once.
        fps: The frames per second to yield.
        height, width: The size of the frames to yield.
        limit: How many frames are yielded at most; None for all.

    Yields:
        A frame, uint8 [height, width, 3], RGB. The same array again where a slow video shows one for longer.

    Raises:
        BreaksOffError: After the last sound frame of a damaged file, unless `limit` was reached before.
    """
    display = Display(video)
    last: TimedFrame | None = None
    pixels = np.empty(0)
    for frame in at_rate(((frame, frame.time) for frame in video.frames), fps, limit):
        if frame is not last:
            last, pixels = frame, display.show(frame.picture, height, width)
        yield pixels


def read_video(path: str | os.PathLike, *, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """Read all frames of a video, whatever their times, in its own size.

    A file that breaks off (its writer was interrupted) is read as far as it goes, with a warning that says how far.

    Args:
        path: The path of a video file, in any format that PyAV reads.
        max_frames: How many frames are read at most; all frames if `None`.

    Returns:
        The frames, uint8 [F, H, W, 3], RGB, upright and with square pixels; and the number of frames per second.

    Raises:
        ValueError: If there is no such file, it is not a video, none of its frames can be decoded, the frame rate is
            not known, or `max_frames` is less than 1.
    """
    if max_frames is not None:
        check_counts(max_frames=max_frames)
    frames: list[np.ndarray] = []
    times: list[Fraction] = []
    with open_video(path) as video:
        display = Display(video)
        try:
            for frame in itertools.islice(video.frames, max_frames):
                frames.append(display.show(frame.picture, display.height, display.width))
                times.append(frame.time)
        except BreaksOffError as error:
            warnings.warn(str(error), stacklevel=2)
    rate = _rate(video.stated_rate, times)
    if rate is None:
        raise ValueError(f"'{path}' does not say its frame rate ({counted(len(frames), 'frame')} read)")
    return np.stack(frames), float(rate)


def _rate(stated: Fraction | None, times: Sequence[Fraction]) -> Fraction | None:
    """Return the stated rate, unless there is none or the times of the frames contradict it: some recorders state the
    ticks of their clock, a thousand per second."""
    duration = times[-1] - times[0]
    if duration <= 0:
        return stated
    measured = (len(times) - 1) / duration
    return stated if stated and 0.8 < measured / stated < 1.25 else measured
