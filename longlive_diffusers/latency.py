"""How a video in the making arrives at whoever watches it: how soon, how evenly, and how fast."""

import math
import statistics
from collections.abc import Iterable

from .limits import FPS
from .number_checks import check_counts, is_finite


NO_STALL = 1e-6  # seconds that frames may be late: those that are just in time are late by a rounding error


class Latency:
    """
    The times at which the parts of one video were handed over, as numbers. A viewer is imagined who begins to watch
    with the first frame, at `fps` frames per second, and stands still whenever the next frame is not there yet.

    Args:
        fps: The number of frames per second at which the video is watched.

    Raises:
        ValueError: If that is not a positive finite number.
    """

    def __init__(self, fps: float = FPS):
        if not is_finite(fps) or fps <= 0:
            raise ValueError(f"`fps` must be a positive finite number, got {fps!r}.")
        self.fps = float(fps)
        self.first_frame: float | None = None
        """Seconds until the first frames were there; None before."""
        self.stalls = 0
        """How often the viewer has had to wait after the first frame. A wait whose end has not come does not count."""
        self.stalled_seconds = 0.0
        """How long the viewer has waited in all."""
        self._last = 0.0
        self._gaps: list[float] = []
        self._later_frames = 0  # those that came after the first hand-over
        self._resumed, self._frames_since = 0.0, 0  # when the viewer began or went on, and the frames to see since

    def add(self, seconds_since_begin: float, num_frames: int) -> None:
        """
        Note that further frames were handed over.

        Args:
            seconds_since_begin: When, in seconds since the video was asked for.
            num_frames: How many.

        Raises:
            ValueError: If the time is not a finite number, or is before the last one's; if there is not at least one
                frame.
        """
        if not is_finite(seconds_since_begin) or seconds_since_begin < self._last:
            raise ValueError(
                f"`seconds_since_begin` must be a finite number of at least {self._last:g}, that of the last frames, "
                f"got {seconds_since_begin!r}."
            )
        check_counts(num_frames=num_frames)
        now, last, self._last = float(seconds_since_begin), self._last, float(seconds_since_begin)
        if self.first_frame is None:
            self.first_frame = self._resumed = now
        else:
            self._gaps.append(now - last)
            self._later_frames += int(num_frames)
            self._stall_until(now)
        self._frames_since += int(num_frames)

    @property
    def between_chunks_median(self) -> float | None:
        """The median of the seconds between two successive hand-overs; None before the second."""
        return statistics.median(self._gaps) if self._gaps else None

    @property
    def between_chunks_p95(self) -> float | None:
        """The 95th percentile of the seconds between two successive hand-overs, see [`quantile`]; None before the
        second."""
        return quantile(self._gaps, 0.95) if self._gaps else None

    @property
    def frames_per_second(self) -> float | None:
        """The frames that came after the first hand-over, by the seconds from that one to the last; None if no time
        has passed."""
        seconds = sum(self._gaps)
        return self._later_frames / seconds if seconds > 0 else None

    @property
    def real_time_factor(self) -> float | None:
        """The seconds of video, at `fps`, that are made in a second after the first hand-over: `frames_per_second` by
        `fps`. From 1 on, the viewer can keep up with the video for as long as it lasts."""
        rate = self.frames_per_second
        return None if rate is None else rate / self.fps

    def as_dict(self) -> dict[str, float | None]:
        """Return all numbers by their names, as JSON takes them."""
        return {
            "first_frame": self.first_frame,
            "between_chunks_median": self.between_chunks_median,
            "between_chunks_p95": self.between_chunks_p95,
            "frames_per_second": self.frames_per_second,
            "real_time_factor": self.real_time_factor,
            "stalls": self.stalls,
            "stalled_seconds": self.stalled_seconds,
        }

    def _stall_until(self, now: float) -> None:
        """Let the viewer see what there was until frames come; if that was over earlier, it is a stall."""
        seen_until = self._resumed + self._frames_since / self.fps
        if now - seen_until > NO_STALL:
            self.stalls += 1
            self.stalled_seconds += now - seen_until
            self._resumed, self._frames_since = now, 0


def quantile(values: Iterable[float], part: float) -> float:
    """Return the least of some values that at least `part` of them, above 0 and at most 1, do not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(part * len(ordered) - 1e-9) - 1]  # 0.95 is a little more, or less, than 95 / 100
