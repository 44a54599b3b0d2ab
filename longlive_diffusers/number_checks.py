"""What counts as an integer, a number or a boolean where one is expected, and the errors for everything else."""

import math
from numbers import Integral, Real
from typing import TypeGuard

import numpy as np


def is_count(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer (NumPy's included) that is not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite real number (NumPy's included) that is not a boolean, and not beyond float64."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def check_booleans(**booleans: object) -> None:
    """Raise a ValueError unless all values are booleans (NumPy's included): in Python, "no" is as true as "yes"."""
    for name, value in booleans.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_counts(*, at_least: int = 1, **counts: object) -> None:
    """Raise a ValueError unless all values are integers, `at_least` so large."""
    for name, value in counts.items():
        if not is_count(value) or value < at_least:
            raise ValueError(f"`{name}` must be an integer of at least {at_least}, got {value!r}.")


def check_non_negative(*, at_most: float = math.inf, **numbers: object) -> None:
    """Raise a ValueError unless all values are finite numbers of at least 0, and `at_most` so large."""
    for name, value in numbers.items():
        if not is_finite(value) or value < 0:
            raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}.")
        if value > at_most:
            raise ValueError(f"`{name}` must be at most {at_most:g}, got {value!r}.")
