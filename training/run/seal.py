"""The seal of a checkpoint: a list of its files with their sizes and checksums, written last. It tells a checkpoint
that is complete from one of which a power cut, a full disk or a copy left only a part."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from longlive_diffusers.atomic_write import write_text
from longlive_diffusers.json_files import read_json


SEAL = "files.json"
BLOCK = 1 << 24  # bytes that are read at a time
Sums = dict[str, list[int]]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in memory."""
    if os.name != "posix":  # elsewhere, folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path, *, rank: int, num_ranks: int) -> Sums:
    """Sync this process's share of the files below a folder, and return their sizes and checksums by name."""
    sums = {}
    for path in _files(folder)[rank::num_ranks]:
        sync(path)
        sums[path.relative_to(folder).as_posix()] = _sum(path)
    return sums


def write_seal(folder: Path, sums: Sums) -> None:
    """Seal a folder whose files are synced, with the sums of all processes."""
    write_text(folder / SEAL, json.dumps(sums, indent=1, sort_keys=True))
    sync(folder / SEAL)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(path)


def damages(folder: Path, *, rank: int, num_ranks: int) -> list[str]:
    """Return what is wrong with this process's share of the files of a sealed folder, one text for each."""
    try:
        sums: Any = read_json(folder / SEAL)
        files = sorted((folder / name, size, checksum) for name, (size, checksum) in sums.items())
    except FileNotFoundError:
        return [f"'{folder}' has no {SEAL}: it is no checkpoint of this script, or was not written to its end"]
    except (AttributeError, TypeError, ValueError):
        return [f"'{folder / SEAL}' is damaged"]
    return [text for file in files[rank::num_ranks] for text in _damage(*file)]


def _damage(path: Path, size: int, checksum: int) -> list[str]:
    try:
        found, found_checksum = _sum(path)
    except FileNotFoundError:
        return [f"'{path}' is missing"]
    except OSError as error:
        return [f"'{path}' cannot be read: {error.strerror}"]
    if found != size:
        return [f"'{path}' is damaged, {found} bytes instead of {size}"]
    return [] if found_checksum == checksum else [f"'{path}' is damaged: its content is not what was written"]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def _sum(path: Path) -> list[int]:
    size, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]
