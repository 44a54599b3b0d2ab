"""Signals that are handled for a while."""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle signals in the block, and as before after it; those that are ignored stay so, which is what `nohup` and
    jobs in the background of a script ask for. Only in the main thread."""
    found = {number: signal.getsignal(number) for number in numbers}
    previous = {number: before for number, before in found.items() if before is not signal.SIG_IGN}
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():  # None: of another language, which cannot be put back
            signal.signal(number, signal.SIG_DFL if before is None else before)
