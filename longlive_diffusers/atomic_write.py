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
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .user_path import user_path


_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
_LONGEST_NAME = 255  # bytes, on every common file system


def check_new_file(path: str | os.PathLike) -> Path:
    """Check, before long work, that a file can be created or replaced at `path`.

    Returns:
        The path, with `~` resolved. Nothing is created or changed on the disk.

    Raises:
        ValueError: If its folder is missing or cannot be written to, if it is a folder, or a file that cannot be
            written to, or if no file can have its name.
    """
    if "\0" in os.fspath(path):
        raise ValueError(f"Cannot write {os.fspath(path)!r}: no file can have a null character in its name")
    path = user_path(path)
    try:
        if path.is_dir():
            raise ValueError(f"Cannot write '{path}': it is a folder, not a file")
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"Cannot write '{path}': permission denied")
        if path.is_socket() or path.is_block_device():
            raise ValueError(f"Cannot write '{path}': it is not a file")
        if is_stream(path):
            return path
        target = Path(os.path.realpath(path))  # a link is written through, also where it leads to nothing yet
        if not (path.parent.is_dir() and target.parent.is_dir()):  # a missing "a" in a/../b, too
            leads = f", to which '{path}' leads," if path.is_symlink() else ""
            raise ValueError(
                f"Cannot write '{path}': the folder '{target.parent if leads else path.parent}'{leads} does not exist"
            )
        if target.is_symlink():
            raise ValueError(f"Cannot write '{path}': it is a link that leads back to itself")
        tempfile.TemporaryFile(dir=target.parent).close()  # os.access promises what some file systems do not keep
    except OSError as error:  # a name that is too long, a file system that is read-only
        raise ValueError(f"Cannot write '{path}': {error.strerror}") from error
    return path


def is_stream(path: Path) -> bool:
    """Whether a path is that of a pipe or a device, such as `/dev/stdout`: it is written to, and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def shortened(name: str, room: int) -> str:
    """Cut a name, if need be, so that `room` more bytes fit behind it."""
    while len(os.fsencode(name)) > _LONGEST_NAME - room:
        name = name[:-1]
    return name


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8; an existing one is replaced.

    Raises:
        OSError: If that fails; it names the file.
    """
    try:
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:  # of a full disk, it names no file, and elsewhere the temporary one
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Give a temporary path to write to; when the block ends without an error, the file takes the name `path`.

    Args:
        path: The file to create or to replace. A link is written through; a pipe or a device is written to directly.

    Raises:
        OSError: If it cannot be written, also where safetensors says so in an error of its own.
    """
    if is_stream(Path(path)):
        yield Path(path)
        return
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        with _errors_of_the_disk(path):
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
        path: The folder to create. Its parents are created, too. A link is written through.
        replace: Whether an existing folder gives way, with all that is in it. Otherwise it has to be empty.

    Raises:
        OSError: If `path` has something in it that is not to be replaced, or if it cannot be written, also where
            safetensors says so in an error of its own.
    """
    path = Path(os.path.realpath(path))  # a link is written through; "." and ".." have no name that could be given
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        with _errors_of_the_disk(path):
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


@contextmanager
def _errors_of_the_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"'{path}' could not be written: {error}") from error


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
    ending = f".{uuid.uuid4().hex[:8]}.partial"
    return path.with_name(f".{shortened(path.name, 1 + len(ending))}{ending}")
