"""The types of command-line arguments, and the options that several commands share."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from ..models.layer_kv_cache import KV_CACHE_DTYPES
from ..number_checks import is_finite


def count(text: str) -> int:
    """Parse an integer of at least 1."""
    return _in_range(text, int, 1)


def size(text: str) -> int:
    """Parse an integer of at least 0."""
    return _in_range(text, int, 0)


def seed(text: str) -> int:
    """Parse an integer that PyTorch takes as a seed."""
    value = size(text)
    if value >= 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not below 2**64, where seeds end")
    return value


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    value = _in_range(text, float, 0)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def non_negative(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _in_range(text, float, 0)


def device(text: str) -> torch.device:
    """Parse a device that exists."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a device; try cpu, cuda or cuda:1") from error
    num_devices = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= num_devices:
        raise argparse.ArgumentTypeError(f"there is no device '{text}': torch sees {num_devices} CUDA devices")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise argparse.ArgumentTypeError("there is no device 'mps'")
    return found


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def add_device_option(parser: argparse._ActionsContainer, what: str = "The device to run on") -> None:
    """Add `--device`."""
    parser.add_argument("--device", type=device, help=f"{what}: cuda, cuda:1, cpu (default: cuda if there is one).")


def add_cache_options(parser: argparse._ActionsContainer, *, compares_dtypes: bool = False) -> None:
    """Add `--window-size`, `--sink-size` and `--kv-cache-dtype`, which every command calls alike.

    Args:
        parser: A parser, or a group of one.
        compares_dtypes: Whether `--kv-cache-dtype` takes several dtypes, to compare them.
    """
    parser.add_argument(
        "--window-size", type=count, help="The number of latent frames that the KV cache holds (default: the model's)."
    )
    parser.add_argument(
        "--sink-size",
        type=size,
        help="How many of the video's first latent frames are never forgotten (default: the model's).",
    )
    choices = ("auto", *KV_CACHE_DTYPES)
    if compares_dtypes:
        parser.add_argument(
            "--kv-cache-dtype",
            nargs="+",
            choices=choices,
            default=[],
            help="Compare ways to store keys and values; auto is the network's dtype.",
        )
    else:
        parser.add_argument(
            "--kv-cache-dtype",
            choices=choices,
            default="auto",
            help="What keys and values are stored as: nvfp4 takes 4 bits, fp8 takes 8 (default: the network's dtype).",
        )


def add_renamed(parser: argparse._ActionsContainer, old: str, new: str) -> None:
    """Accept an option's former name only to say what it is called now."""
    parser.add_argument(
        old, nargs="*", action=_Renamed, new_name=new, help=argparse.SUPPRESS, default=argparse.SUPPRESS
    )


class _Renamed(argparse.Action):
    def __init__(self, *args, new_name: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.new_name = new_name

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(f"{option_string} is now called {self.new_name}")


def _in_range(text: str, kind: type, least: int) -> Any:
    try:
        value = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a{'n integer' if kind is int else ' number'}") from error
    if not is_finite(value) or value < least:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {least}")
    return value
