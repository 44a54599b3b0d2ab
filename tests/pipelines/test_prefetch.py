"""Running ahead in a thread: order, depth, errors, and that nothing is left running."""

import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from longlive_diffusers.pipelines.prefetch import OneThread, Prefetcher


WAIT = 10  # seconds after which something that should happen is said not to


@pytest.fixture
def prefetch():
    """Create prefetchers that share one worker."""
    with OneThread("test") as worker:
        yield functools.partial(Prefetcher, worker=worker)


class Source:
    """Counts upwards, `stop` excluded; notes how far it has come, and where and how it was closed."""

    def __init__(self, stop: int | None = None, fails_at: int | None = None):
        self.stop, self.fails_at = stop, fails_at
        self.made: list[int] = []
        self.thread: threading.Thread | None = None
        self.closed_in: threading.Thread | None = None
        self.closed = threading.Event()
        self.progress = threading.Condition()

    def items(self) -> Iterator[int]:
        self.thread = threading.current_thread()
        try:
            number = 0
            while self.stop is None or number < self.stop:
                if number == self.fails_at:
                    raise RuntimeError(f"failed at {number}")
                with self.progress:
                    self.made.append(number)
                    self.progress.notify_all()
                yield number
                number += 1
        finally:
            self.closed_in = threading.current_thread()
            self.closed.set()

    def wait_until_made(self, count: int) -> None:
        with self.progress:
            assert self.progress.wait_for(lambda: len(self.made) >= count, timeout=WAIT)


def test_items_come_in_order_and_then_no_more(prefetch):
    prefetcher = prefetch(Source(stop=50).items(), depth=3)
    assert list(prefetcher) == list(range(50))
    assert list(prefetcher) == []


def test_the_source_runs_in_one_other_thread_and_is_closed_there(prefetch):
    source = Source(stop=5)
    list(prefetch(source.items()))
    assert source.thread is not threading.current_thread()
    assert source.closed_in is source.thread


@pytest.mark.parametrize("depth", [1, 3])
def test_it_runs_ahead_and_no_further_than_depth(prefetch, depth):
    """`depth` items wait; one more has been made, for which there is no room."""
    source = Source()
    with prefetch(source.items(), depth=depth) as prefetcher:
        for taken in range(1, 4):
            assert next(prefetcher) == taken - 1
            source.wait_until_made(taken + depth + 1)
            time.sleep(0.1)
            assert len(source.made) == taken + depth + 1


def test_making_and_using_items_overlap(prefetch):
    """Each waits for the other here, which in one thread would never end."""
    used = threading.Event()

    def items():
        yield "first"
        assert used.wait(WAIT), "nobody used the first item while the second was being made"
        yield "second"

    with prefetch(items()) as prefetcher:
        assert next(prefetcher) == "first"
        used.set()
        assert next(prefetcher) == "second"


def test_an_error_comes_after_the_items_before_it(prefetch):
    source = Source(fails_at=3)
    prefetcher = prefetch(source.items())
    received = []
    with pytest.raises(RuntimeError, match="failed at 3"):
        for item in prefetcher:
            received.append(item)
    assert received == [0, 1, 2]
    assert list(prefetcher) == []
    assert source.closed.is_set()


def test_an_error_at_the_very_start_is_raised(prefetch):
    with pytest.raises(RuntimeError, match="failed at 0"):
        next(prefetch(Source(fails_at=0).items()))


def test_an_error_knows_the_line_it_came_from(prefetch):
    with pytest.raises(RuntimeError) as caught:
        list(prefetch(Source(fails_at=1).items()))
    assert caught.traceback[-1].name == "items"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_ordinary_exception_reaches_the_consumer_too(prefetch, kind):
    def items():
        yield 0
        raise kind

    prefetcher = prefetch(items())
    assert next(prefetcher) == 0
    with pytest.raises(kind):
        next(prefetcher)


@pytest.mark.skipif(sys.platform == "win32", reason="signals itself")
def test_ctrl_c_in_the_consumer_stops_the_item_in_progress(prefetch):
    waiting, stopped = threading.Event(), threading.Event()

    def slow() -> Iterator[bool]:
        waiting.wait(WAIT)
        time.sleep(0.2)  # until it waits
        os.kill(os.getpid(), signal.SIGINT)
        yield stopped.wait(WAIT)

    prefetcher = prefetch(slow(), stop=stopped.set)
    with pytest.raises(KeyboardInterrupt):
        waiting.set()
        next(prefetcher)
    assert stopped.is_set() and list(prefetcher) == []


LEFT_OPEN = """
import threading, time
from longlive_diffusers.pipelines.prefetch import OneThread, Prefetcher

stopped, made = threading.Event(), []

def slow():
    while True:
        made.append(len(made))
        yield stopped.wait(5 if made[-1] else 0)

prefetcher = Prefetcher(slow(), OneThread("test"), stop=lambda: (stopped.set(), print("stopped")))
next(prefetcher)
while len(made) < 2:
    time.sleep(0.01)
threading._register_atexit(lambda: print("ends"))
import atexit
atexit.register(lambda: print(made))
"""


def test_the_end_of_the_interpreter_waits_for_no_further_items():
    began = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["ends", "stopped", "[0, 1]"]
    assert time.perf_counter() - began < 60


def test_closing_while_items_wait_closes_the_source(prefetch):
    source = Source()
    prefetcher = prefetch(source.items())
    source.wait_until_made(2)
    prefetcher.close()
    assert source.closed_in is source.thread
    assert list(prefetcher) == []


def test_closing_waits_for_the_item_in_progress(prefetch):
    begun, go_on, finished = threading.Event(), threading.Event(), threading.Event()

    def items():
        begun.set()
        assert go_on.wait(WAIT)
        finished.set()
        yield 0

    prefetcher = prefetch(items())
    assert begun.wait(WAIT)
    closing = threading.Thread(target=prefetcher.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive(), "the source is still at work"
    go_on.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert finished.is_set()


@pytest.mark.parametrize("begun", [False, True])
def test_closing_from_another_thread_ends_a_consumer_that_waits(prefetch, begun):
    """Whether the item that it waits for is being made or not begun yet."""
    making, go_on, received = threading.Event(), threading.Event(), []

    def items():
        making.set()
        assert go_on.wait(WAIT)
        yield 0

    other = None if begun else prefetch(items())  # holds the worker
    prefetcher = prefetch(items() if begun else iter([0]))
    assert making.wait(WAIT)
    consumer = threading.Thread(target=lambda: received.extend(prefetcher))
    consumer.start()
    closing = threading.Thread(target=prefetcher.close)
    closing.start()
    time.sleep(0.1)
    go_on.set()
    for thread in (consumer, closing):
        thread.join(WAIT)
        assert not thread.is_alive()
    assert received == []
    if other is not None:
        other.close()


def test_closing_twice_is_closing_once(prefetch):
    prefetcher = prefetch(Source().items())
    prefetcher.close()
    prefetcher.close()
    assert list(prefetcher) == []


def test_leaving_a_with_block_closes_also_when_it_raises(prefetch):
    source = Source()
    with pytest.raises(ZeroDivisionError), prefetch(source.items()) as prefetcher:
        next(prefetcher)
        _ = 1 / 0
    assert source.closed.is_set()


def test_a_prefetcher_that_is_dropped_closes_its_source(prefetch):
    """The worker does not hold it: once nobody else does, nothing more is made."""
    source = Source()
    prefetcher = prefetch(source.items())
    assert next(prefetcher) == 0
    del prefetcher
    gc.collect()
    assert source.closed.wait(WAIT)
    assert len(source.made) <= 3


def test_the_source_may_close_what_runs_it(prefetch):
    """As when a callback, called while a chunk is denoised, closes its session: a thread cannot wait for itself."""
    prefetchers, known, ended = [], threading.Event(), threading.Event()

    def items():
        assert known.wait(WAIT)
        try:
            yield 0
            prefetchers[0].close()
            yield 1
        finally:
            ended.set()

    prefetchers.append(prefetch(items()))
    known.set()
    assert ended.wait(WAIT)
    assert list(prefetchers[0]) == []


def test_any_iterator_will_do(prefetch):
    assert list(prefetch(iter([3, 1, 2]))) == [3, 1, 2]
    assert list(prefetch(iter([]))) == []


def test_none_is_an_item_like_any_other(prefetch):
    assert list(prefetch(iter([None, 0, None]))) == [None, 0, None]


def test_an_exception_may_be_an_item(prefetch):
    error = ValueError("not raised")
    assert list(prefetch(iter([error]))) == [error]


@pytest.mark.parametrize("depth", [0, -1])
def test_a_depth_below_one_raises_before_a_thread_is_started(prefetch, depth):
    source = Source()
    with pytest.raises(ValueError, match=f"`depth` must be at least 1, got {depth}"):
        prefetch(source.items(), depth=depth)
    assert source.thread is None


def test_several_share_a_worker_in_turn(prefetch):
    """None of them holds the thread while its consumer is busy."""
    first, second = Source(), Source()
    with prefetch(first.items()) as one, prefetch(second.items(), depth=2) as other:
        assert [(next(one), next(other)) for _ in range(20)] == [(number, number) for number in range(20)]
    assert first.thread is second.thread
    assert first.closed.is_set() and second.closed.is_set()


# -- what comes after an item ----------------------------------------------------------------------------------------


def test_the_consumer_has_an_item_before_what_comes_after_it(prefetch):
    """Each call waits here until its item was taken. They are made in the worker's thread, before the next item."""
    source, taken, happened = Source(stop=4), threading.Semaphore(0), []

    def after() -> None:
        assert taken.acquire(timeout=WAIT)
        happened.append((source.made[-1], threading.current_thread() is source.thread))

    with prefetch(source.items(), after=after) as prefetcher:
        for _ in prefetcher:
            taken.release()
    assert happened == [(number, True) for number in range(4)]


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_what_fails_after_an_item_is_raised_in_place_of_the_next(prefetch, fails_at):
    source, calls = Source(), []

    def after() -> None:
        calls.append(None)
        if len(calls) == fails_at + 1:
            raise RuntimeError(f"failed after {fails_at}")

    prefetcher, received = prefetch(source.items(), after=after), []
    with pytest.raises(RuntimeError, match=f"failed after {fails_at}"):
        for item in prefetcher:
            received.append(item)
    assert received == list(range(fails_at + 1)) == source.made
    assert source.closed.is_set() and list(prefetcher) == []


def test_nothing_comes_after_the_end_nor_after_an_error_nor_after_what_was_dropped(prefetch):
    for source in (Source(stop=2), Source(fails_at=2)):
        calls = []
        prefetcher = prefetch(source.items(), after=lambda calls=calls: calls.append(None), depth=4)
        try:
            list(prefetcher)
        except RuntimeError:
            assert source.fails_at is not None
        prefetcher.close()
        assert len(calls) == 2


def test_closing_waits_for_what_comes_after_the_item_in_progress(prefetch):
    begun, calls = threading.Event(), []

    def after() -> None:
        begun.set()
        time.sleep(0.1)
        calls.append(None)

    source = Source()
    prefetcher = prefetch(source.items(), after=after)
    assert begun.wait(WAIT)
    prefetcher.close()
    assert len(calls) == len(source.made) == 1
