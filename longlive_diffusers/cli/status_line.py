"""One line that says how far a stream is, whatever else is printed or typed meanwhile."""

import os
import shutil
import sys
from types import TracebackType
from typing import TextIO

from tqdm.utils import disp_trim


# What every terminal but the oldest understands (ECMA-48, and DEC's save and restore).
SAVE, RESTORE, CLEAR_REST, WHOLE_SCREEN, UP = "\x1b7", "\x1b8", "\x1b[K", "\x1b[r", "\x1b[1A"


class StatusLine:
    """
    Shows the newest of many messages, and what they are about.

    On a terminal, its last row is taken out of what scrolls, and shows both: what is typed above stays whole.
    Elsewhere (a pipe, a file), each message is a line, and a new subject is another one.

    Args:
        stream: Where to write; stdout by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = sys.stdout if stream is None else stream  # None where stdout is closed
        self._size: os.terminal_size | None = None  # of the terminal whose last row is taken
        self._subject: str | None = None

    def show(self, message: str, subject: str) -> None:
        """Show a message in place of the last."""
        if self._stream is None:
            return
        if not has_rows(self._stream):
            if subject != self._subject:
                self._subject = subject
                print(subject, file=self._stream)
            print(message, file=self._stream, flush=True)
            return
        size = shutil.get_terminal_size()
        if size != self._size:
            self._take_last_row(size)
        message = disp_trim(" ".join(f"{message}, {subject}".split()), size.columns - 1)  # wide characters take two
        self._write(f"{SAVE}{_row(size.lines)}{message}{CLEAR_REST}{RESTORE}")

    def close(self) -> None:
        """Give the row back."""
        if self._size is not None:
            self._write(f"{SAVE}{WHOLE_SCREEN}{_row(self._size.lines)}{CLEAR_REST}{RESTORE}")
            self._size = None

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take_last_row(self, size: os.terminal_size) -> None:
        # The line break makes room, should the cursor be in the last row.
        self._write(f"\n{SAVE}\x1b[1;{size.lines - 1}r{RESTORE}{UP}")
        self._size = size

    def _write(self, text: str) -> None:
        assert self._stream is not None
        self._stream.write(text)
        self._stream.flush()


def has_rows(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can write in a row of its choice."""
    return stream.isatty() and sys.platform != "win32" and os.environ.get("TERM", "dumb") != "dumb"


def _row(row: int) -> str:
    return f"\x1b[{row};1H"
