"""Arrivals that were worked out by hand, and what they mean for a viewer."""

import json
import math

import pytest

from longlive_diffusers.latency import Latency, quantile


NAMES = [
    "first_frame",
    "between_chunks_median",
    "between_chunks_p95",
    "frames_per_second",
    "real_time_factor",
    "stalls",
    "stalled_seconds",
]
# Frames per second of the viewer, then (seconds, frames) of each hand-over, then the numbers in the order of NAMES.
ARRIVALS = {
    "nothing": (24, [], [None, None, None, None, None, 0, 0]),
    "one chunk": (24, [(2.5, 29)], [2.5, None, None, None, None, 0, 0]),
    "at once": (24, [(0, 5)], [0, None, None, None, None, 0, 0]),
    "just in time": (10, [(1, 10), (2, 10), (3, 10)], [1, 1, 1, 10, 1, 0, 0]),
    "faster": (10, [(1, 10), (1.5, 10), (2, 10)], [1, 0.5, 0.5, 20, 2, 0, 0]),
    # Frames until 2, until 4 and until 6; there at 3, 5 and 7.
    "always late": (10, [(1, 10), (3, 10), (5, 10), (7, 10)], [1, 2, 2, 5, 0.5, 3, 3]),
    # Until 3.5 there is enough; the chunk at 4 is half a second late, the one at 5 comes as the frames end.
    "late once": (8, [(1, 12), (2, 8), (4, 8), (5, 8)], [1, 1, 2, 6, 0.75, 1, 0.5]),
    # What came early is watched while the next is awaited: from 0 to 3 without a break.
    "a long chunk after a burst": (10, [(0, 10), (0, 10), (0, 10), (3, 10)], [0, 0, 3, 10, 1, 0, 0]),
    "a burst of all": (24, [(1, 5), (1, 8), (1, 8)], [1, 0, 0, None, None, 0, 0]),
    "frame by frame": (2, [(1, 1), (1.5, 1), (2.25, 1), (2.5, 1)], [1, 0.5, 0.75, 2, 1, 1, 0.25]),
    # Late by 1 at 3; the viewer goes on from there, until 5, so that 4.5 is early, and until 7, so that 7.5 is late.
    "after a stall the clock goes on": (4, [(0, 8), (3, 8), (4.5, 8), (7.5, 8)], [0, 3, 3, 3.2, 0.8, 2, 1.5]),
}


@pytest.mark.parametrize(("fps", "arrivals", "expected"), ARRIVALS.values(), ids=ARRIVALS)
def test_arrivals(fps, arrivals, expected):
    latency = Latency(fps)
    for seconds, frames in arrivals:
        latency.add(seconds, frames)
    found = latency.as_dict()
    assert list(found) == NAMES
    for name, value in zip(NAMES, expected, strict=True):
        assert found[name] == getattr(latency, name)
        assert found[name] == (value if value is None else pytest.approx(value, abs=1e-12)), name
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(("count", "place"), [(1, 1), (2, 2), (19, 19), (20, 19), (21, 20), (100, 95)])
def test_the_95th_percentile_is_a_gap_that_occurred(count, place):
    """Gaps of 1, 2, ..., in any order."""
    latency, now = Latency(), 0.0
    latency.add(now, 1)
    for gap in sorted(range(1, count + 1), key=lambda gap: gap * 7 % (count + 1)):
        now += gap
        latency.add(now, 1)
    assert latency.between_chunks_p95 == place
    assert latency.between_chunks_median == (count + 1) / 2


@pytest.mark.parametrize("percent", [1, 5, 50, 95, 99, 100])
def test_a_quantile_is_the_least_value_that_so_many_do_not_exceed(percent):
    for count in (1, 2, 3, 20, 99, 100, 101, 180, 1000):
        found = quantile(range(1, count + 1), percent / 100)
        assert 100 * found >= percent * count and 100 * (found - 1) < percent * count


def test_rounding_is_no_stall():
    """A thousand chunks of 8 frames at 24 frames per second, each just in time: no sum of thirds is exact."""
    latency, now = Latency(), 0.1
    for _ in range(1000):
        latency.add(now, 8)
        now += 8 / 24
    assert (latency.stalls, latency.stalled_seconds) == (0, 0)
    assert latency.real_time_factor == pytest.approx(1)


def test_a_video_that_is_watched_at_another_rate():
    slow, fast = Latency(12), Latency()
    for latency in (slow, fast):
        for seconds in (1, 2, 3):
            latency.add(seconds, 16)
    assert (slow.real_time_factor, fast.real_time_factor) == (pytest.approx(4 / 3), pytest.approx(2 / 3))
    assert (slow.stalls, fast.stalls) == (0, 2)
    assert fast.stalled_seconds == pytest.approx(2 / 3)


BAD = {
    "before the last": (1.9, 8, "`seconds_since_begin` must be a finite number of at least 2, .* got 1.9"),
    "negative": (-1, 8, "`seconds_since_begin` must be a finite number of at least 2, .* got -1"),
    "not a number": (math.nan, 8, "`seconds_since_begin` must be a finite number .* got nan"),
    "never": (math.inf, 8, "`seconds_since_begin` must be a finite number .* got inf"),
    "text": ("3", 8, "`seconds_since_begin` must be a finite number .* got '3'"),
    "no frames": (3, 0, "`num_frames` must be an integer of at least 1, got 0"),
    "half a frame": (3, 0.5, "`num_frames` must be an integer of at least 1, got 0.5"),
}


@pytest.mark.parametrize(("seconds", "frames", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_and_changes_nothing(seconds, frames, message):
    latency = Latency()
    latency.add(1, 8)
    latency.add(2, 8)
    before = latency.as_dict()
    with pytest.raises(ValueError, match=message):
        latency.add(seconds, frames)
    assert latency.as_dict() == before
    latency.add(2, 8)  # at the same time is no step back


def test_nothing_is_handed_over_before_the_beginning():
    with pytest.raises(ValueError, match="at least 0"):
        Latency().add(-0.1, 1)


@pytest.mark.parametrize("fps", [0, -24, math.nan, math.inf, "24", None, True])
def test_a_rate_that_cannot_be_is_refused(fps):
    with pytest.raises(ValueError, match="`fps` must be a positive finite number"):
        Latency(fps)
