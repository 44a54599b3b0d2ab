"""The statistics of two settings measured in turns, with numbers whose results are known."""

import pytest

from longlive_diffusers.benchmark.ratios import PairedRatio, in_turns


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5])
def test_turns_alternate_which_is_first(rounds):
    order = []

    def turn(name):
        order.append(name)
        return f"{name}{len(order)}"

    pairs = list(in_turns(lambda: turn("A"), lambda: turn("B"), rounds))
    assert "".join(order) == "ABBAABBAAB"[: 2 * rounds]
    assert pairs == [("A1", "B2"), ("A4", "B3"), ("A5", "B6"), ("A8", "B7"), ("A9", "B10")][:rounds]


def test_a_steady_drift_cancels_out():
    """A machine that becomes slower by 10 % with each run: in turns, the ratio is still that of the settings."""
    clock = iter(range(100))
    turn = lambda seconds: lambda: seconds * (1 + 0.1 * next(clock))  # noqa: E731
    first, second = zip(*in_turns(turn(1.0), turn(2.0), 8), strict=True)
    ratios = PairedRatio(first, second).ratios
    assert sum(map(float, second)) / sum(first) == pytest.approx(2)
    assert min(ratios) < 2 < max(ratios)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([2.0, 4.0, 1.0], [1.0, 3.0, 1.0], {"first": 2, "second": 1, "ratio": 0.75, "range": (0.5, 1), "sure": 0.75}),
        ([1, 1, 2, 2], [2, 3, 8, 10], {"first": 1.5, "second": 5.5, "ratio": 3.5, "range": (2, 5), "sure": 0.875}),
        ([3.0], [1.5], {"first": 3, "second": 1.5, "ratio": 0.5, "range": (0.5, 0.5), "sure": 0}),
        ([1.0] * 6, [1.0] * 6, {"first": 1, "second": 1, "ratio": 1, "range": (1, 1), "sure": 1 - 1 / 32}),
    ],
)
def test_the_ratio_is_the_median_of_the_pairs(first, second, expected):
    found = PairedRatio(first, second).as_dict()
    assert (found["first"], found["second"]) == (expected["first"], expected["second"])
    assert found["ratio"] == pytest.approx(expected["ratio"])
    assert (found["least_ratio"], found["greatest_ratio"]) == pytest.approx(expected["range"])
    assert found["confidence"] == pytest.approx(expected["sure"])
    assert found["pairs"] == [list(pair) for pair in zip(first, second, strict=True)]


def test_pairs_have_two_values():
    with pytest.raises(ValueError, match="shorter"):
        PairedRatio([1.0, 2.0], [1.0]).as_dict()
