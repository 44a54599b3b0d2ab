"""The samples of a training set: clips with captions, and the reasons why some of them cannot be used."""

from dataclasses import dataclass
from pathlib import Path


VIDEO_SUFFIXES = (
    ".avi",
    ".flv",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ts",
    ".webm",
    ".wmv",
)


@dataclass(frozen=True)
class Clip:
    """
    Args:
        path: The video file; None in a text-only training set.
        caption: The description of what it shows.
        cut: Whether it begins a shot; False if it continues the clip before under a new prompt.
    """

    path: Path | None
    caption: str
    cut: bool = True


@dataclass(frozen=True)
class Sample:
    """
    Args:
        name: Its name in the training set.
        clips: Its clips, in order.
        durations: The length of each clip in chunks; None if none are given.
    """

    name: str
    clips: tuple[Clip, ...]
    durations: tuple[int, ...] | None = None


class SampleError(ValueError):
    """One sample cannot be used. It is left out; the others are used."""


def describe_skipped(skipped: dict[str, str], total: int, limit: int = 20) -> str:
    """Say in one line how many of `total` samples were left out, and why for the first `limit` of them."""
    if not skipped:
        return f"{total} samples were found"
    named = [f"'{name}': {reason}" for name, reason in list(skipped.items())[:limit]]
    more = f"; and {len(skipped) - limit} more" if len(skipped) > limit else ""
    return f"{len(skipped)} of {total} samples were left out: {'; '.join(named)}{more}"
