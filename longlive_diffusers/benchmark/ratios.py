"""How two settings compare that were measured in turns, and how sure that is."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar


Result = TypeVar("Result")


def in_turns(
    first: Callable[[], Result], second: Callable[[], Result], rounds: int
) -> Iterator[tuple[Result, Result]]:
    """Call both once in every round, in the order A B, B A, A B, ..., so that a machine that slows down or speeds up
    steadily slows both alike; yield what they returned, A's first."""
    for number in range(rounds):
        if number % 2 == 0:
            from_first = first()
            yield from_first, second()
        else:
            from_second = second()
            yield first(), from_second


@dataclass(frozen=True)
class PairedRatio:
    """
    Two settings by one quantity, measured in pairs of successive runs.

    Args:
        first, second: The values of each setting, in the order of the pairs.
    """

    first: Sequence[float]
    second: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """The second setting's value by the first's, pair by pair."""
        return [after / before for before, after in zip(self.first, self.second, strict=True)]

    @property
    def confidence(self) -> float:
        """How likely the range of the ratios holds the median of all that could be measured, if pairs are independent:
        it does not only if all of them lie on the same side of it."""
        return 1 - 2.0 ** (1 - len(self.ratios))

    def as_dict(self) -> dict[str, Any]:
        """Return the medians of both settings, and the ratio with its spread, as JSON takes them."""
        ratios = self.ratios
        return {
            "first": statistics.median(self.first),
            "second": statistics.median(self.second),
            "ratio": statistics.median(ratios),
            "least_ratio": min(ratios),
            "greatest_ratio": max(ratios),
            "confidence": self.confidence,
            "pairs": [list(pair) for pair in zip(self.first, self.second, strict=True)],
        }
