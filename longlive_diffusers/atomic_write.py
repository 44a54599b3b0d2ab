"""Files and folders that appear complete or not at all.

Whatever is written under a name that somebody else may read - a cached latent, a pipeline of many gigabytes - is
written under a temporary name beside it first, and renamed when it is complete. A program that fails removes what it
had written; one that is killed leaves a file whose name begins with a dot and ends in `.partial`, which nothing here
reads and `remove_unfinished` removes. Temporary names are unique, so several processes may write the same file: the
last one to finish wins.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8; an existing one is replaced."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Give a temporary path to write to; when the block ends without an error, the file takes the name `path`.

    Args:
        path: The file to create or to replace.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt too
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
    """
    Give an empty temporary folder to fill; when the block ends without an error, it takes the name `path`.

    Args:
        path: The folder to create. Its parents are created, too.
        replace: Whether an existing folder gives way, with all that is in it. Otherwise it has to be empty.

    Raises:
        OSError: `path` has something in it that is not to be replaced.
    """
    path = Path(path)
    if path.name in ("", ".."):  # "." and ".." have no name that could be given
        path = path.resolve()
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if replace and path.exists():
            _exchange(path, temporary)
        else:
            if path.is_dir():
                path.rmdir()  # where it is not empty, this raises rather than overwrites
            temporary.rename(path)
    except BaseException:  # KeyboardInterrupt too: gigabytes must not stay behind under a hidden name
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_unfinished(folder: str | os.PathLike) -> None:
    """
    Remove what killed programs left half-written in a folder.

    Args:
        folder: A folder that no other program is writing to; what is deeper in it stays.
    """
    for path in Path(folder).iterdir():
        if _TEMPORARY_NAME.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _exchange(path: Path, temporary: Path) -> None:
    """Give `temporary` the name `path`, and remove what had it; if that fails, what had it keeps it."""
    replaced = _temporary(path)
    path.rename(replaced)
    try:
        temporary.rename(path)
    except BaseException:
        replaced.rename(path)
        raise
    shutil.rmtree(replaced)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
