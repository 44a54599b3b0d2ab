"""Stage: who is on, who waits, and whose chunk is made next, on the one device that all streams share.

The event loop decides; chunks are made in one thread and encoded in another. Streams are independent of each other, so
they take turns chunk by chunk, and one that fails, or whose viewer has gone, is no other's concern.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..parallel.stream_ranks import RanksParted
from ..pipelines.memory import MemoryShortage
from ..wording import counted
from .messages import Error, Queued, Start
from .metrics import Metrics
from .model import ServedModel, StreamPlan
from .sessions import Sessions
from .settings import IDLE_SECONDS, ServeSettings
from .stream import LiveStream


logger = logging.getLogger(__name__)


class Stage:
    """
    Makes the streams of a server, a chunk of each in turn. All of it is called in the event loop's thread.

    Args:
        sessions: The sessions of its streams.
        settings: How many streams there may be, and for how long.
        on_failure: Called when no stream can be made any more, because other ranks that share them have failed.
    """

    def __init__(self, sessions: Sessions, settings: ServeSettings, on_failure: Callable[[], object] = lambda: None):
        self._sessions = sessions
        self.settings, self.metrics, self._on_failure = settings, Metrics(), on_failure
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longlive-make")
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longlive-encode")
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longlive-plan")
        self._on: deque[LiveStream] = deque()  # the next one first
        self._waiting: deque[LiveStream] = deque()
        self._lacks_memory = False  # for another stream, until one of those that are on ends
        self._wake = asyncio.Event()
        self._is_running = False
        self._closing: asyncio.Task | None = None
        self._ends: set[asyncio.Future] = set()  # of encoding, not done yet

    @property
    def streams(self) -> list[LiveStream]:
        """The streams that are on, and those that wait."""
        return [*self._on, *self._waiting]

    @property
    def num_streams(self) -> int:
        """How many streams are on."""
        return len(self._on)

    @property
    def num_waiting(self) -> int:
        """How many wait for one of them to end."""
        return len(self._waiting)

    async def plan(self, model: ServedModel, start: Start) -> StreamPlan:
        """Check what a client asks for. A picture takes time and memory to decode: one is, at a time.

        Raises:
            ValueError: If it cannot be made.
        """
        return await asyncio.get_running_loop().run_in_executor(self._planner, model.plan, start, self.settings)

    def enter(self, stream: LiveStream) -> None:
        """Let a stream begin, or wait.

        Raises:
            ValueError: If too many wait already, or the server stops.
        """
        if self._closing is not None:
            raise ValueError("The server stops.")
        if len(self._on) + len(self._waiting) >= self.settings.max_sessions + self.settings.max_queue:
            raise ValueError(
                f"{counted(len(self._on), 'stream')} being made and {len(self._waiting)} waiting are as many as this "
                "server takes. Try again later."
            )
        self._waiting.append(stream)
        self._admit()
        if stream in self._waiting:
            stream.send(Queued(len(self._waiting)))
        self._wake.set()

    def stop(self, stream: LiveStream, reason: str) -> None:
        """End a stream."""
        if stream.is_over:
            return
        stream.stop(reason)
        if stream in self._waiting:
            self._waiting.remove(stream)
            stream.send_end()
            self._tell_positions()
        self._wake.set()

    def wake(self) -> None:
        """Look again who may go on: a viewer has watched on, or changed something."""
        self._wake.set()

    async def run(self) -> None:
        """Make chunks for as long as the server runs."""
        self._is_running = True
        try:
            await self._run()
        finally:
            self._is_running = False

    async def _run(self) -> None:
        while True:
            self._wake.clear()  # before looking: what changes from now on is looked at once more
            for stream in [stream for stream in self._on if stream.is_over]:
                await self._take_off(stream)
            if self._closing is not None and not self._on:
                return
            self._admit()
            self._end_idle()
            stream = self._next()
            if stream is None:
                await self._sleep()
            else:
                await self._make_chunk(stream)

    async def close(self) -> None:
        """End all streams, and return when all that they had is encoded. After that, nothing is made any more. It may
        be called again: who does not wait for it any longer does not keep it from its end."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for stream in [*self._waiting, *self._on]:
            self.stop(stream, "server")
        self._wake.set()
        while self._on and self._is_running:
            await asyncio.sleep(0.01)
        for stream in list(self._on):  # a mistake has ended the making, and whoever watches waits for an end
            await self._take_off(stream)
        if self._ends:
            await asyncio.wait(self._ends)
        ending = asyncio.get_running_loop().run_in_executor(self._maker, self._sessions.end)
        await asyncio.wait([ending])
        if (error := ending.exception()) is not None:
            logger.error("%s while the other ranks were let go", type(error).__name__, exc_info=error)
        self._maker.shutdown()
        self._encoder.shutdown()
        self._planner.shutdown(wait=False)

    def _admit(self) -> None:
        while self._waiting and len(self._on) < self.settings.max_sessions and not self._lacks_memory:
            stream = self._waiting.popleft()
            self._on.appendleft(stream)  # its viewer has waited the longest for a frame
            self._tell_positions()
            seconds = 60 * self.settings.max_minutes
            stream.deadline = asyncio.get_running_loop().call_later(seconds, self.stop, stream, "time")

    def _next(self) -> LiveStream | None:
        """Return the stream whose turn it is, and put it behind the others."""
        now = time.monotonic()
        for stream in self._on:
            stream.note_turn(now)
        ready = [stream for stream in self._on if stream.wants_chunk]
        if not ready:
            return None
        self._on.remove(ready[0])
        self._on.append(ready[0])
        return ready[0]

    def _end_idle(self) -> None:
        """End streams that wait for their viewers, where others wait for a place."""
        long_ago = time.monotonic() - IDLE_SECONDS
        for stream in list(self._on) if self._waiting else []:
            if stream.idle_since is not None and stream.idle_since < long_ago:
                self.stop(stream, "idle")

    async def _sleep(self) -> None:
        """Wait until something changes; where streams wait for a place, look at times whether one idles."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), 1.0 if self._waiting else None)

    async def _make_chunk(self, stream: LiveStream) -> None:
        loop = asyncio.get_running_loop()
        making = loop.run_in_executor(self._maker, stream.make_chunk)
        await asyncio.wait([making])
        error = making.exception()
        if isinstance(error, MemoryShortage) and len(self._on) > 1:
            if not stream.is_over:  # meanwhile; then it is taken off like any other
                self._put_back(stream)
        elif error is not None:
            self._fail(stream, error)
        elif (chunk := making.result()) is None:
            self.stop(stream, "finished")
        else:
            self.metrics.count_chunk(chunk)
            self._follow(stream, loop.run_in_executor(self._encoder, stream.encode, chunk))

    def _put_back(self, stream: LiveStream) -> None:
        """Let a stream that lacks memory wait once more, before all others. Its time begins when it does."""
        assert stream.deadline is not None
        stream.deadline.cancel()
        stream.deadline = None
        self._on.remove(stream)
        self._waiting.appendleft(stream)
        self._lacks_memory = True
        self._tell_positions()

    def _follow(self, stream: LiveStream, encoding: asyncio.Future) -> None:
        """Keep an eye on what the encoder does for a stream."""

        def done(future: asyncio.Future) -> None:
            self._ends.discard(future)
            error = future.exception()
            if error is not None:
                self._fail(stream, error)

        self._ends.add(encoding)
        encoding.add_done_callback(done)

    def _fail(self, stream: LiveStream, error: BaseException) -> None:
        """End a stream with an error. What is not the client's to mend is for the log, and may name files."""
        is_clients = isinstance(error, ValueError)
        logger.log(
            logging.INFO if is_clients else logging.ERROR,
            "stream %s: %s: %s",
            stream.id,
            type(error).__name__,
            error,
            exc_info=None if is_clients else error,
        )
        text = (
            str(error) if is_clients else f"The stream has failed ({type(error).__name__}); the server's log says why."
        )
        stream.send(Error(text))
        self.stop(stream, "error")
        if isinstance(error, RanksParted):
            self._on_failure()

    async def _take_off(self, stream: LiveStream) -> None:
        """Free a stream's caches, and send its end after its last frame."""
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(self._maker, stream.close)
        await asyncio.wait([closing])
        error = closing.exception()
        if error is not None:
            logger.error("stream %s: %s while it was closed", stream.id, type(error).__name__, exc_info=error)
        self._on.remove(stream)
        self._lacks_memory = False
        if stream.deadline is not None:
            stream.deadline.cancel()
        # The encoder works in order: by then, it has encoded all that was made.
        self._follow(stream, loop.run_in_executor(self._encoder, stream.send_end))

    def _tell_positions(self) -> None:
        for position, stream in enumerate(self._waiting, start=1):
            stream.send(Queued(position))
