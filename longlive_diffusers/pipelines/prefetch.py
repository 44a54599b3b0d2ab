"""Run an iterator ahead of its consumer, in the thread of a worker."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar


Item = TypeVar("Item")


@dataclass(frozen=True)
class _Produced(Generic[Item]):
    """An item of the source."""

    item: Item


class OneThread(ThreadPoolExecutor):
    """An executor with one thread, in which it is known. When the interpreter ends, which waits for the thread, it
    does not begin what it was still to do for prefetchers."""

    def __init__(self, name: str):
        self._idents: list[int] = []
        note = self._idents.append  # the thread must not hold the executor, or neither would end
        super().__init__(max_workers=1, thread_name_prefix=name, initializer=lambda: note(threading.get_ident()))
        self.runs: weakref.WeakSet[_Run] = weakref.WeakSet()
        # As `concurrent.futures` itself does, which then waits for its threads: `atexit` comes later.
        threading._register_atexit(partial(_stop, weakref.ref(self)))  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is the executor's."""
        return threading.get_ident() in self._idents


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
        worker: The thread; it cannot wait for items that it makes itself, nor for their end.
        depth: How many finished items may wait, at least 1.
        after: Called in the worker's thread after each item, which the consumer has by then. Its exception is raised
            in place of the next item.
        stop: Called, from any thread, when nobody wants the item in progress any more: after Ctrl-C, and when the
            interpreter ends.
    """

    def __init__(
        self,
        source: Iterator[Item],
        worker: OneThread,
        depth: int = 1,
        *,
        after: Callable[[], object] | None = None,
        stop: Callable[[], object] | None = None,
    ):
        self._pending: deque[Future[_Produced[Item] | None]] = deque()
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1, got {depth}.")
        self._run = _Run(source, after, stop)
        self._worker = worker
        worker.runs.add(self._run)
        self._finished, self._lock = False, threading.Lock()
        self._closing: Future[None] | None = None  # all who close it wait for the same end
        for _ in range(depth + 1):
            self._begin_item()

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
            self._run.stop()
            self.close()
            raise
        if produced is None:
            self.close()
        with self._lock:
            if self._finished or produced is None:
                raise StopIteration
            self._pending.popleft()
            self._begin_item()
        return produced.item

    def close(self) -> None:
        with self._lock:
            self._finished = True
            self._drop()
            if self._closing is None:
                self._closing = self._worker.submit(self._run.end)
        if not self._worker.is_here:
            self._closing.result()

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __del__(self) -> None:
        self._drop()

    def _begin_item(self) -> None:
        item: Future[_Produced[Item] | None] = Future()
        self._pending.append(item)
        self._worker.submit(self._run.advance, item)

    def _drop(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()


class _Run(Generic[Item]):
    """The worker's side of a prefetcher. It does not hold the prefetcher, so that one may be dropped meanwhile."""

    def __init__(
        self,
        source: Iterator[Item],
        after: Callable[[], object] | None,
        stop: Callable[[], object] | None,
    ):
        self.source, self.after, self._stop = source, after, stop
        self._ended, self._stopped = False, False
        self._error: BaseException | None = None  # what came after the last item, if nobody has been told

    def advance(self, promise: "Future[_Produced[Item] | None]") -> None:
        """Make the next item (None after the last), let the consumer have it, and do what comes after it."""
        if not promise.set_running_or_notify_cancel():  # dropped
            return
        produced, error = self._next()
        if error is not None:
            promise.set_exception(error)
            return
        promise.set_result(produced)
        if produced is not None and self.after is not None:
            try:
                self.after()
            except BaseException as caught:
                self._error = caught
                self.close()

    def _next(self) -> tuple[_Produced[Item] | None, BaseException | None]:
        """Return the next item, or an error: raised further up, it would hold the future that it is set on."""
        if self._error is not None:
            error, self._error = self._error, None
            return None, error
        if self._ended or self._stopped:
            return None, None
        try:
            return _Produced(next(self.source)), None
        except StopIteration:
            self.close()
            return None, None
        except BaseException as error:
            self.close()
            return None, error

    def stop(self) -> None:
        """Begin no further item, and let the one in progress end early, if it can; from any thread."""
        self._stopped = True
        if self._stop is not None:
            self._stop()

    def end(self) -> None:
        """Close the source, and forget an error that nobody will ask for: its traceback has what the source held."""
        self._error = None
        self.close()

    def close(self) -> None:
        """Close the source; only once."""
        if not self._ended and isinstance(self.source, Generator):
            self._ended = True
            self.source.close()
        self._ended = True


def _stop(executor: "weakref.ref[OneThread]") -> None:
    """Stop what an executor does for prefetchers, if it is still there."""
    alive = executor()
    for run in () if alive is None else tuple(alive.runs):
        run.stop()
