"""Which numbers a setting may have: written beside its type, and checked in one place.

learning_rate: Annotated[float, POSITIVE] = field(default=1e-5, ...)
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Allowed:
    """
    Args:
        text: What a number must be, as a message says it.
        contains: Whether a finite number is allowed.
    """

    text: str
    contains: Callable[[float], bool]


POSITIVE = Allowed("positive", lambda number: number > 0)
NOT_NEGATIVE = Allowed("at least 0", lambda number: number >= 0)
FRACTION = Allowed("in [0, 1)", lambda number: 0 <= number < 1)
FRAME_RATE = Allowed("in (0, 1000]", lambda number: 0 < number <= 1000)
SEED = Allowed("in [0, 2**32), as NumPy's seeds are", lambda number: 0 <= number < 2**32)


def check_settings(groups: Iterable[Any]) -> None:
    """
    Check all settings of some dataclasses: numbers have to be finite, below 2**63, and what their annotation allows;
    texts have to have something in them that a file or an option can be named with.

    Raises:
        ValueError: For the first setting that is not; the message names it as an option.
    """
    for group in groups:
        hints = get_type_hints(type(group), include_extras=True)
        for name, value in vars(group).items():
            if isinstance(value, str):
                _check_text(name, value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                _check_number(name, value, get_args(hints[name]))


def _check_text(name: str, value: str) -> None:
    if not value.strip():
        raise ValueError(f"--{name} must not be empty")
    if "\0" in value:
        raise ValueError(f"--{name} must not contain a null character, got {value!r}")


def _check_number(name: str, value: float, annotations: Iterable[Any]) -> None:
    if not math.isfinite(value):
        raise ValueError(f"--{name} must be finite, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"--{name} must be below 2**63, got {value}")
    for allowed in annotations:
        if isinstance(allowed, Allowed) and not allowed.contains(value):
            raise ValueError(f"--{name} must be {allowed.text}, got {value}")
