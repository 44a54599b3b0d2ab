"""The check that a file to be read is there, with one message whatever it holds."""

import os
from pathlib import Path

from ..user_path import user_path


def existing_file(path: str | os.PathLike, kind: str) -> Path:
    """Return the path of a file, or of a pipe, that can be read.

    Args:
        path: The path; `~` is the user's home.
        kind: What the file should hold, for the message.

    Raises:
        ValueError: If there is no such file, it is a folder or a device, or reading it is not permitted.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"the {kind} must be the path of a file, got {path!r}")
    path = user_path(path)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null character
        raise ValueError(f"the {kind} {str(path)!r} cannot be read: {error}") from error
    if not exists:
        raise ValueError(f"the {kind} '{path}' does not exist")
    if not path.is_file() and not path.is_fifo():
        raise ValueError(f"the {kind} '{path}' is not a file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"the {kind} '{path}' cannot be read: permission denied")
    return path
