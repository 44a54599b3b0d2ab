"""How many frames each clip has and which file it is, remembered from one run to the next.

Only decoding tells whether a clip is sound, and only reading it tells whether it is the file that was encoded before;
both take long. So the results are kept in one small file, each with the size and the times of its clip. The file is
replaced as a whole, with the results that another process has added in the meantime; a result that is lost in spite of
that is just computed again.
"""

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from data.cache_files import make_folder
from data.videos import ClipError, count_frames
from longlive_diffusers.atomic_write import write_text
from longlive_diffusers.json_files import read_json
from longlive_diffusers.user_path import user_path


INDEX_FILE = "clips.json"
INDEX_FORMAT = 2
SECONDS_BETWEEN_SAVES = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SoundClip:
    """
    Args:
        frames: The number of its frames, at most the limit of the index.
        digest: The SHA-256 of the file, in hexadecimal digits.
    """

    frames: int
    digest: str


@dataclass(frozen=True)
class _Entry:
    """What was found out about a file of this size and these times; `problem` says why it is no good."""

    stamp: list[int]
    frames: int
    digest: str
    problem: str | None


class ClipIndex:
    """
    Args:
        folder: The folder where the results are kept; None to keep none.
        fps: The frames per second at which frames are counted.
        limit: The number of frames at which counting stops.

    Raises:
        ValueError: If the folder cannot be created.
    """

    def __init__(self, folder: str | os.PathLike | None, fps: Fraction, limit: int) -> None:
        self.path = None
        if folder is not None:
            make_folder(user_path(folder))
            self.path = user_path(folder) / INDEX_FILE
        self.fps, self.limit = fps, limit
        self._entries = self._load()
        self._saved_at = time.monotonic()
        self._is_changed = False

    def look_at(self, path: Path) -> SoundClip:
        """
        Return what is known about a clip, after reading it if it is not known or has changed.

        Raises:
            ClipError: As in `count_frames`, or if there is no such file.
        """
        path = path.absolute()
        key = f"{path}|{self.fps}|{self.limit}"
        entry = self._entries.get(key)
        try:
            stamp = _stamp(path)
            if entry is None or entry.stamp != stamp:
                entry = self._entries[key] = self._read(path, stamp)
                self._is_changed = True
        except OSError as error:
            raise ClipError(f"'{path}' cannot be read: {error.strerror}") from error
        if time.monotonic() - self._saved_at > SECONDS_BETWEEN_SAVES:
            self.save()
        if entry.problem is not None:
            raise ClipError(entry.problem)
        return SoundClip(entry.frames, entry.digest)

    def save(self) -> None:
        """Write the results, if there are new ones."""
        if self.path is None or not self._is_changed:
            return
        self._entries = {**self._load(), **self._entries}
        clips = {key: asdict(entry) for key, entry in self._entries.items()}
        write_text(self.path, json.dumps({"format": INDEX_FORMAT, "clips": clips}))
        self._saved_at, self._is_changed = time.monotonic(), False

    def _read(self, path: Path, stamp: list[int]) -> _Entry:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            return _Entry(stamp, count_frames(path, self.fps, self.limit), digest, None)
        except ClipError as error:
            return _Entry(stamp, 0, digest, str(error))

    def _load(self) -> dict[str, _Entry]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            return _entries(read_json(self.path))
        except ValueError as error:
            logger.warning("'%s' %s: its clips are looked at again", self.path, error)
            return {}


def _stamp(path: Path) -> list[int]:
    """Return what differs if a file was changed or replaced: its size and times. A file in the place of another may
    have its size, and be given its modification time, but not the time at which that was done."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _entries(content: object) -> dict[str, _Entry]:
    """
    Return the entries of an index that was read.

    Raises:
        ValueError: If it is damaged, or of another format. The message begins with a verb.
    """
    if not isinstance(content, dict) or content.get("format") != INDEX_FORMAT:
        raise ValueError(f"is not of format {INDEX_FORMAT}")
    clips = content.get("clips")
    kinds = {"stamp": list, "frames": int, "digest": str, "problem": str | None}
    for entry in clips.values() if isinstance(clips, dict) else [None]:
        if not isinstance(entry, dict) or entry.keys() != kinds.keys():
            raise ValueError("is damaged")
        if not all(isinstance(entry[name], kind) for name, kind in kinds.items()):
            raise ValueError("is damaged")
    return {key: _Entry(**entry) for key, entry in clips.items()}
