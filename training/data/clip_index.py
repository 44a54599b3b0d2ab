"""The number of frames of each clip, remembered from one run to the next.

Only decoding tells whether a clip is sound, and that takes long. So the results are kept in one small file, each with
the size and the modification time of its clip. The file is replaced as a whole, with the results that another process
has added in the meantime; a result that is lost in spite of that is just computed again.
"""

import json
import logging
import os
import time
from fractions import Fraction
from pathlib import Path

from data.videos import ClipError, count_frames
from longlive_diffusers.atomic_write import write_text


INDEX_FILE = "clips.json"
INDEX_FORMAT = 1
SECONDS_BETWEEN_SAVES = 10.0

logger = logging.getLogger(__name__)


class ClipIndex:
    """
    Args:
        folder: The folder where the results are kept; None to keep none.
        fps: The frames per second at which frames are counted.
        limit: The number of frames at which counting stops.
    """

    def __init__(self, folder: str | os.PathLike | None, fps: Fraction, limit: int) -> None:
        self.path = None if folder is None else Path(folder).expanduser() / INDEX_FILE
        self.fps, self.limit = fps, limit
        self._entries = self._load()
        self._saved_at = time.monotonic()
        self._is_changed = False

    def count(self, path: Path) -> int:
        """
        Return the number of frames of a clip, at most `limit`.

        Raises:
            ClipError: As in `count_frames`, or if there is no such file.
        """
        path = path.absolute()
        try:
            status = path.stat()
        except OSError as error:
            raise ClipError(f"'{path}' cannot be read: {error.strerror}") from error
        key = f"{path}|{self.fps}|{self.limit}"
        stamp = [status.st_size, status.st_mtime_ns]
        entry = self._entries.get(key)
        if entry is None or entry["stamp"] != stamp:
            entry = {"stamp": stamp, **self._decode(path)}
            self._entries[key] = entry
            self._is_changed = True
            if time.monotonic() - self._saved_at > SECONDS_BETWEEN_SAVES:
                self.save()
        if entry["problem"] is not None:
            raise ClipError(entry["problem"])
        return entry["frames"]

    def save(self) -> None:
        """Write the results, if there are new ones."""
        if self.path is None or not self._is_changed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._entries = {**self._load(), **self._entries}
        write_text(self.path, json.dumps({"format": INDEX_FORMAT, "clips": self._entries}))
        self._saved_at, self._is_changed = time.monotonic(), False

    def _decode(self, path: Path) -> dict:
        try:
            return {"frames": count_frames(path, self.fps, self.limit), "problem": None}
        except ClipError as error:
            return {"frames": 0, "problem": str(error)}

    def _load(self) -> dict[str, dict]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            logger.warning("'%s' is damaged (%s): its clips are looked at again", self.path, error)
            return {}
        if not isinstance(content, dict) or content.get("format") != INDEX_FORMAT:
            logger.warning("'%s' is of another format than %d: its clips are looked at again", self.path, INDEX_FORMAT)
            return {}
        return content["clips"]
