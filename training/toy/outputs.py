"""Folders that scripts write: checked before any work, as of some what is in them will be gone."""

from collections.abc import Collection
from pathlib import Path


def check_is_folder(folder: Path) -> None:
    """Raise a ValueError if something else has the name of a folder, which need not exist."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output '{folder}' is not a folder")


def check_replaceable(folder: Path, written: Collection[str]) -> None:
    """
    Check that a folder can be replaced without losing anything else.

    Args:
        folder: The folder, which need not exist.
        written: The names that an earlier run can have left in it.

    Raises:
        ValueError: If it is a file, or holds anything of another name.
    """
    check_is_folder(folder)
    others = sorted(path.name for path in folder.iterdir() if path.name not in written) if folder.exists() else []
    if others:
        raise ValueError(
            f"--output '{folder}' would be replaced, and holds '{others[0]}', which is not of an earlier run of this "
            "script: give another folder"
        )
    for parent in folder.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(f"--output '{folder}' cannot be written: '{parent}' is not a folder")
            break
