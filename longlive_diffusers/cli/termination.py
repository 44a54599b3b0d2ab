"""What a command does when it is told to end (SIGTERM, or SIGHUP of a terminal that closes)."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ..signal_handling import handled


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def ends_cleanly(outcome: str | None = "what was half-written is removed") -> Iterator[None]:
    """Let a signal to end unwind the block, so that what was half-written is removed or finished, say in one line what
    came of it (None: somebody else does), and exit with the status that a shell expects (143 after SIGTERM). Signals
    only reach the main thread: elsewhere, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the end
        if outcome is not None:
            print(f"longlive: ended by {signal.Signals(number).name}; {outcome}", file=sys.stderr)
        raise SystemExit(128 + number)

    with handled(_SIGNALS, end):
        yield
