"""Run an iterator ahead of its consumer, in a separate thread."""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar


Item = TypeVar("Item")
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class _Produced(Generic[Item]):
    """An item of the source."""

    item: Item


@dataclass(frozen=True)
class _Finished:
    """The source has ended, or failed."""

    error: BaseException | None = None


class Prefetcher(Generic[Item]):
    """
    Iterates `source` in a background thread, at most `depth` items ahead of the consumer.

    An exception in `source` is raised in the consumer, after the items that came before it. `close()` (also at the end
    of a `with` block, or when the prefetcher is dropped) stops the thread after the item it is working on, closes
    `source` and waits for both.

    Args:
        source: The iterator to run; a generator is closed in the thread that ran it.
        depth: How many finished items may wait, at least 1.
    """

    def __init__(self, source: Iterator[Item], depth: int = 1):
        self._stopped = threading.Event()
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1, got {depth}.")
        self._queue: queue.Queue[_Produced[Item] | _Finished] = queue.Queue(depth)
        self._finished = False
        self._thread = threading.Thread(
            target=_produce, args=(source, self._queue, self._stopped), name="longlive-denoise", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Prefetcher[Item]":
        return self

    def __next__(self) -> Item:
        if self._finished:
            raise StopIteration
        message = self._queue.get()
        if isinstance(message, _Finished):
            self.close()
            raise message.error or StopIteration
        return message.item

    def close(self) -> None:
        self._finished = True
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __del__(self) -> None:
        self._stopped.set()


def _produce(source: Iterator, items: queue.Queue, stopped: threading.Event) -> None:
    """Do the thread's work. It must not hold the Prefetcher itself, or a dropped one would never stop."""
    finished = _Finished()
    try:
        try:
            for item in source:
                if not _put(items, _Produced(item), stopped):
                    break
        finally:
            if isinstance(source, Generator):
                source.close()
    except BaseException as error:  # whatever it is, it belongs to the consumer
        finished = _Finished(error)
    _put(items, finished, stopped)


def _put(items: queue.Queue, message: "_Produced | _Finished", stopped: threading.Event) -> bool:
    """Put a message once there is room, unless `stopped`: a consumer that is gone would never make room."""
    while not stopped.is_set():
        try:
            items.put(message, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False
