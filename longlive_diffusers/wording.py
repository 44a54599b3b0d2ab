"""How messages say counts."""

from collections.abc import Iterable


def counted(count: int, noun: str) -> str:
    """Return "1 chunk" or "3 chunks"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def alternatives(numbers: Iterable[int]) -> str:
    """Return "1", "1 or 3" or "1, 3 or 6": each number once, in order."""
    *others, last = map(str, sorted(set(numbers)))
    return f"{', '.join(others)} or {last}" if others else last
