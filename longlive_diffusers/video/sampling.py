"""Choose, of frames that come at any times, those that a video at a constant rate shows."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, TypeVar


Frame = TypeVar("Frame")


def at_rate(frames: Iterable[tuple[Frame, Fraction]], fps: Fraction, limit: int | None = None) -> Iterator[Frame]:
    """
    Yield at most `limit` of `frames`, one for each of the times 0, 1/fps, 2/fps, ... after the first frame: the
    nearest one, or the earlier of two that are equally near. No more of `frames` are read than necessary. A frame that
    is not later than the one before it is skipped. The last frame is assumed to last as long as the one before it, so
    frames that already have the requested rate are yielded one by one.

    Args:
        frames: The frames, each with its time in seconds.
        fps: The frames per second to yield.
        limit: The largest number of frames to yield; None for no limit.
    """
    most = math.inf if limit is None else limit
    num_given, start, last_time, gap = 0, None, Fraction(0), Fraction(0)
    last: Any = None  # a frame, once there is one
    for frame, time in frames:
        if start is None:
            start, last = time, frame
        elif time - start > last_time:
            gap = time - start - last_time
            middle = last_time + gap / 2
            while num_given < most and num_given / fps <= middle:
                yield last
                num_given += 1
            last, last_time = frame, time - start
        # Up to its own time, no later frame can be nearer.
        while num_given < most and num_given / fps <= last_time:
            yield last
            num_given += 1
        if num_given >= most:
            return
    if start is None:
        return
    total = max(1, math.floor((last_time + gap) * fps + Fraction(1, 2)))
    for _ in range(num_given, int(min(total, most))):
        yield last
