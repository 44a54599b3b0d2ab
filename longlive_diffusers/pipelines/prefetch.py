"""Run an iterator ahead of its consumer, in the thread of a worker."""

import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar


Item = TypeVar("Item")


@dataclass(frozen=True)
class _Produced(Generic[Item]):
    """An item of the source."""

    item: Item


class Prefetcher(Generic[Item]):
    """
    Iterates `source` in a worker's thread, ahead of the consumer: at most `depth` items wait while one more is made.

    The items are made one task at a time, so that several prefetchers can share a worker: none holds its thread while
    its consumer is busy. An exception in `source` is raised in the consumer, after the items that came before it.
    `close()` (also at the end of a `with` block, and from any thread: a consumer that waits gets its end) drops what
    was not begun, waits for the item in progress, and closes `source` in the thread that ran it. A prefetcher that is
    dropped makes no further items.

    Args:
        source: The iterator to run.
        worker: An executor with one thread.
        depth: How many finished items may wait, at least 1.
    """

    def __init__(self, source: Iterator[Item], worker: ThreadPoolExecutor, depth: int = 1):
        self._pending: deque[Future[_Produced[Item] | None]] = deque()
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1, got {depth}.")
        self._run = _Run(source)
        self._worker = worker
        self._finished, self._lock = False, threading.Lock()
        self._closing: Future[None] | None = None  # all who close it wait for the same end
        for _ in range(depth + 1):
            self._pending.append(worker.submit(self._run.advance))

    def __iter__(self) -> "Prefetcher[Item]":
        return self

    def __next__(self) -> Item:
        with self._lock:
            if self._finished:
                raise StopIteration
            future = self._pending[0]
        try:
            produced = future.result()
        except CancelledError:  # closed by another thread while this one waited
            raise StopIteration from None
        except BaseException:  # whatever it is, it ends the iteration
            self.close()
            raise
        if produced is None:
            self.close()
        with self._lock:
            if self._finished or produced is None:
                raise StopIteration
            self._pending.popleft()
            self._pending.append(self._worker.submit(self._run.advance))
        return produced.item

    def close(self) -> None:
        with self._lock:
            self._finished = True
            self._drop()
            if self._closing is None:
                self._closing = self._worker.submit(self._run.close)
        if self._run.thread is not threading.current_thread():  # a thread cannot wait for itself
            self._closing.result()

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __del__(self) -> None:
        self._drop()

    def _drop(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()


class _Run(Generic[Item]):
    """The worker's side of a prefetcher. It does not hold the prefetcher, so that one may be dropped meanwhile."""

    def __init__(self, source: Iterator[Item]):
        self.source = source
        self.thread: threading.Thread | None = None
        self._ended = False

    def advance(self) -> _Produced[Item] | None:
        """Make the next item; None after the last."""
        self.thread = threading.current_thread()
        if self._ended:
            return None
        try:
            return _Produced(next(self.source))
        except BaseException as error:
            self.close()
            if isinstance(error, StopIteration):
                return None
            raise

    def close(self) -> None:
        """Close the source; only once."""
        if not self._ended and isinstance(self.source, Generator):
            self._ended = True
            self.source.close()
        self._ended = True
