"""Paths as people write them."""

import os
from pathlib import Path


def user_path(path: str | os.PathLike) -> Path:
    """Return a path in which `~` is the user's home; unlike pathlib's, it takes a name like `~x` as it is where there
    is no such user."""
    return Path(os.path.expanduser(path))
