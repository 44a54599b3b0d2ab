"""Types of command-line arguments."""

import argparse
import math

import torch


def count(text: str) -> int:
    """An integer of at least 1."""
    return _in_range(text, int, 1)


def size(text: str) -> int:
    """An integer of at least 0."""
    return _in_range(text, int, 0)


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _in_range(text, float, 0)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def non_negative(text: str) -> float:
    """A finite number of at least 0."""
    return _in_range(text, float, 0)


def device(text: str) -> torch.device:
    """A device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a device; try cpu, cuda or cuda:1") from error
    number = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= number:
        raise argparse.ArgumentTypeError(f"there is no device '{text}': torch sees {number} CUDA devices")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise argparse.ArgumentTypeError("there is no device 'mps'")
    return found


def default_device() -> torch.device:
    """A GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _in_range(text: str, kind: type, least: int) -> int | float:
    try:
        value = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a{'n integer' if kind is int else ' number'}") from error
    if not math.isfinite(value) or value < least:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {least}")
    return value
