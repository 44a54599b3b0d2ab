"""Who is on and who waits, moment by moment: streams without a model, in an event loop of the test's own."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine

import pytest

from longlive_diffusers.serve.messages import End, Queued, Started
from longlive_diffusers.serve.settings import ServeSettings
from longlive_diffusers.serve.stage import Stage
from longlive_diffusers.serve.stream import LiveStream
from tests.support.fake_sessions import FakeSessions, as_sessions, fake_stream


PATIENCE = 10  # seconds that a message may take on a busy machine


@contextlib.asynccontextmanager
async def running_stage(sessions: FakeSessions, *, max_minutes: float = 30) -> AsyncGenerator[Stage, None]:
    stage = Stage(as_sessions(sessions), ServeSettings(max_minutes=max_minutes))
    running = asyncio.create_task(stage.run())
    try:
        yield stage
    finally:
        await stage.close()
        await running


async def end_of(stream: LiveStream) -> End:
    """What a stream says at its end."""
    async with asyncio.timeout(PATIENCE):
        messages = [message async for message in stream.messages()]
    assert isinstance(messages[-1], End)
    return messages[-1]


async def next_of(stream: LiveStream, kind: type) -> None:
    """Wait until a stream says something of a kind."""
    async with asyncio.timeout(PATIENCE):
        async for message in stream.messages():
            if isinstance(message, kind):
                return


class Gate:
    """A place where the thread that makes chunks waits until the event loop lets it on."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._reached, self._open = asyncio.Event(), threading.Event()

    def __call__(self) -> None:
        self._loop.call_soon_threadsafe(self._reached.set)
        assert self._open.wait(PATIENCE)

    async def reached(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self._reached.wait()

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free of the memory; a session needs 100."""
    memory = {"free_bytes": 1000}
    monkeypatch.setattr("longlive_diffusers.serve.stream.memory_in_use", lambda device: memory)
    return memory


ENDS: dict[str, Callable[[Stage, LiveStream], Coroutine]] = {
    "stopped": lambda stage, stream: stopped(stage, stream, "stopped"),
    "gone": lambda stage, stream: stopped(stage, stream, "gone"),
    "time": lambda stage, stream: stopped(stage, stream, "time"),
    "server": lambda stage, stream: begun(stage.close()),
}


async def stopped(stage: Stage, stream: LiveStream, reason: str) -> None:
    stage.stop(stream, reason)


async def begun(work: Coroutine) -> None:
    """Begin something that the test does not wait for."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, 0.01)


@pytest.mark.parametrize("reason", ENDS)
def test_a_stream_that_ends_while_it_is_opened_and_lacks_memory_has_an_end(free: dict[str, int], reason: str) -> None:
    async def run() -> None:
        gate = Gate()
        sessions = FakeSessions(on_open=gate)
        async with running_stage(sessions) as stage:
            stage.enter(fake_stream(sessions, paused=True))  # one that holds the memory
            stream = fake_stream(sessions)
            stage.enter(stream)
            await gate.reached()
            free["free_bytes"] = 0
            await ENDS[reason](stage, stream)
            gate.open()
            end = await end_of(stream)
            assert (end.reason, end.num_frames) == (reason, 0)
            assert stage.num_waiting == 0 and stream not in stage.streams

    asyncio.run(run())


def test_time_that_a_stream_waits_for_memory_is_not_of_the_time_that_it_may_last(free: dict[str, int]) -> None:
    async def run() -> None:
        sessions = FakeSessions()
        async with running_stage(sessions, max_minutes=10) as stage:
            holder, stream = fake_stream(sessions, paused=True), fake_stream(sessions)
            stage.enter(holder)
            free["free_bytes"] = 0
            stage.enter(stream)
            await next_of(stream, Queued)
            assert stage.num_waiting == 1 and stream.deadline is None
            free["free_bytes"] = 1000
            before = asyncio.get_running_loop().time()
            stage.stop(holder, "stopped")
            await next_of(stream, Started)
            assert stream.deadline is not None and stream.deadline.when() >= before + 10 * 60

    asyncio.run(run())


def test_a_close_that_nobody_waits_for_goes_on() -> None:
    """As that of a server whose grace is over while a chunk is being made: the other ranks are let go all the same."""

    async def run() -> None:
        gate = Gate()
        sessions = FakeSessions(on_advance=gate)
        async with running_stage(sessions) as stage:
            stream = fake_stream(sessions)
            stage.enter(stream)
            await gate.reached()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stage.close(), 0.01)
            with pytest.raises(ValueError, match="The server stops"):
                stage.enter(fake_stream(sessions))
            gate.open()
            await stage.close()
            assert sessions.num_ends == 1 and (await end_of(stream)).reason == "server"
        assert sessions.num_ends == 1

    asyncio.run(run())


def test_after_a_mistake_in_the_stage_its_close_ends_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is closed waits for the end of its stream."""

    def fail() -> None:
        raise KeyError("nobody thought of this")

    async def run() -> None:
        stage = Stage(as_sessions(FakeSessions()), ServeSettings(max_sessions=1))
        running = asyncio.create_task(stage.run())
        on, waiting = fake_stream(paused=True), fake_stream()
        stage.enter(on)
        stage.enter(waiting)
        monkeypatch.setattr(stage, "_next", fail)
        stage.wake()
        await asyncio.wait([running])
        assert isinstance(running.exception(), KeyError)
        await stage.close()
        assert [(await end_of(stream)).reason for stream in (on, waiting)] == ["server", "server"]
        assert stage.streams == []

    asyncio.run(run())
