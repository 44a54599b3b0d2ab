"""How frames are chosen that a video at a constant rate shows, without videos."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_diffusers.video.sampling import at_rate


times = st.lists(st.fractions(0, 20, max_denominator=60), min_size=1, max_size=30, unique=True).map(sorted)
rates = st.sampled_from([Fraction(1), Fraction(24), Fraction(24000, 1001), Fraction(7, 2)])


@settings(deadline=None)
@given(times, rates, st.integers(1, 60))
def test_every_frame_is_the_nearest_in_time(times, fps, limit):
    chosen = list(at_rate([(time, time) for time in times], fps, limit))
    assert 1 <= len(chosen) <= limit
    for number, time in enumerate(chosen):
        wanted = times[0] + number / fps
        assert abs(time - wanted) == min(abs(other - wanted) for other in times)


@settings(deadline=None)
@given(st.integers(2, 50), rates, st.fractions(-3, 3, max_denominator=100))
def test_the_clips_own_rate_gives_back_every_frame(count, fps, start):
    frames = [(number, start + number / fps) for number in range(count)]
    assert list(at_rate(frames, fps, 1000)) == list(range(count))


@settings(deadline=None)
@given(times, rates, st.integers(1, 60))
def test_the_limit_only_cuts_off_and_no_more_is_read_than_needed(times, fps, limit):
    frames = [(time, time) for time in times]
    whole = list(at_rate(frames, fps, 10**6))
    asked = []
    assert list(at_rate((asked.append(frame) or frame for frame in frames), fps, limit)) == whole[:limit]
    if len(whole) > limit:
        assert len([time for time, _ in asked if time > times[0] + limit / fps]) <= 1


def test_frames_whose_time_does_not_go_on_are_passed_over():
    frames = [("a", Fraction(0)), ("b", Fraction(0)), ("c", Fraction(1)), ("d", Fraction(1, 2)), ("e", Fraction(2))]
    assert list(at_rate(frames, Fraction(1), 10)) == ["a", "c", "e"]
    assert list(at_rate([], Fraction(1), 10)) == []
