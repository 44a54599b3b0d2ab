"""What keeps a command alive, or ends it quietly, when its output cannot be shown."""

import io
import os
import sys


def show_any_character() -> None:
    """Print what a console or a pipe cannot show as escapes (`\\u4e00`), rather than end with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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


def counted(count: int, noun: str) -> str:
    """Return "1 chunk" or "3 chunks"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
