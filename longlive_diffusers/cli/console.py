"""What keeps a command alive, or ends it quietly, when its output cannot be shown."""

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


def show_any_character() -> None:
    """Print what a console or a pipe cannot show as escapes (`\\u4e00`), rather than end with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show Python's warnings without the source lines that they come from, and each text once."""
    shown: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in shown and sys.stderr is not None:
            shown.add(text)
            print(f"longlive: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def flush() -> None:
    """Write what is still buffered for stdout.

    Raises:
        OSError: If it cannot be written. It is then forgotten: Python would try again at exit, and complain again.
    """
    if sys.stdout is None:  # closed before the program began
        return
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise
