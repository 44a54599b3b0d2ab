"""Find the samples of a training set, in whichever of its layouts a folder is.

    ROOT/caption/, ROOT/video/      a folder of clips for each sample (`shot_folders.py`)
    ROOT/metadata.jsonl or .csv     a list of clips with captions (`metadata_file.py`)
    ROOT/clip.mp4, ROOT/clip.txt    clips with captions beside them (`flat_folder.py`)

A data set of the Hub becomes a folder with a list of clips (`hub_dataset.py`).
"""

import os
from collections.abc import Callable
from pathlib import Path

from data import flat_folder, metadata_file, shot_folders
from data.names import writable
from data.samples import Sample, SampleError, describe_skipped
from longlive_diffusers.user_path import user_path


def scan(
    root: str | os.PathLike, *, text_only: bool = False, caption_column: str | None = None
) -> tuple[list[Sample], dict[str, str]]:
    """
    Find the samples of a training set. Files are listed and captions read; no video is opened.

    Args:
        root: The folder of the training set.
        text_only: Whether to read only the captions; the clips need not exist then.
        caption_column: The name of the captions in a list of clips; None for the usual names.

    Returns:
        The complete samples, in natural order of their names, or in the order of the list; and what is wrong with
        each of the others, by name.

    Raises:
        ValueError: If there is no such folder, no complete sample in it, or a `caption_column`, but no list.
    """
    root = user_path(root)
    if not os.path.isdir(root):  # also of a name that no file could have
        raise ValueError(f"There is no folder '{root}' with a training set")
    samples, skipped = [], {}
    for name, read in _candidates(root, text_only, caption_column).items():
        try:
            samples.append(read())
        except (SampleError, OSError) as error:
            skipped[name] = writable(str(error))
    if not samples:
        raise ValueError(f"'{root}' has no sample that can be used; {describe_skipped(skipped, len(skipped))}")
    return samples, skipped


def _candidates(root: Path, text_only: bool, caption_column: str | None) -> dict[str, Callable[[], Sample]]:
    """Return the functions that read the samples, by the names of the samples."""
    if (root / "caption").is_dir():
        _check_has_no_columns(root, caption_column)
        return shot_folders.candidates(root, text_only)
    if metadata := metadata_file.find(root):
        return metadata_file.candidates(metadata, text_only, caption_column)
    candidates = flat_folder.candidates(root, text_only)
    _check_has_no_columns(root, caption_column)
    return candidates


def _check_has_no_columns(root: Path, caption_column: str | None) -> None:
    if caption_column is not None:
        raise ValueError(
            f"--caption_column {caption_column}: '{root}' has captions in files, and no list with columns"
        )
