"""The clock of a stream: what its latency is made of, with times that the test decides."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_diffusers.pipelines.pipeline_output import VideoChunk
from longlive_diffusers.serve.messages import End
from longlive_diffusers.serve.stream import LiveStream
from tests.support.fake_sessions import fake_stream


class TimedStream:
    """A stream whose clock stands still but for `wait`."""

    def __init__(self, stream: LiveStream):
        self.stream, self.now = stream, 100.0
        self._made: list[VideoChunk] = []  # and not encoded yet

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def turn(self) -> None:
        """Let the stage look at it, which makes a chunk if one is wanted."""
        self.stream.note_turn(self.now)
        if self.stream.wants_chunk:
            chunk = self.stream.make_chunk()
            assert chunk is not None
            self._made.append(chunk)

    async def leave(self) -> None:
        """Encode the next of the chunks that were made, if there is one."""
        if self._made:
            self.stream.encode(self._made.pop(0))
        await asyncio.sleep(0)

    async def pause(self) -> None:
        self.stream.paused = True
        self.turn()

    async def resume(self) -> None:
        self.stream.paused = False
        self.turn()

    async def play(self) -> None:
        """See all that was sent."""
        self.stream.played(self.stream.num_frames)
        self.turn()

    async def latency(self) -> dict[str, Any]:
        self.stream.stop("stopped")
        self.stream.send_end()
        (end,) = [message async for message in self.stream.messages() if isinstance(message, End)]
        return end.latency


def timed(script: Callable, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the latency of a stream that a script, a coroutine function of a `TimedStream`, was played with."""

    async def run() -> dict[str, Any]:
        errors = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        timed = TimedStream(fake_stream())
        monkeypatch.setattr("longlive_diffusers.serve.stream.time", timed)
        await script(timed)
        latency = await timed.latency()
        assert not errors
        return latency

    return asyncio.run(run())


def test_time_in_which_a_chunk_is_encoded_is_the_servers_also_when_its_viewer_holds_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(timed: TimedStream) -> None:
        timed.turn()
        await timed.pause()
        timed.wait(0.5)  # the encoder has others to do
        await timed.leave()
        timed.wait(0.1)  # held
        await timed.resume()
        timed.wait(0.2)
        await timed.leave()

    latency = timed(script, monkeypatch)
    assert (latency["first_frame"], latency["between_chunks_median"]) == pytest.approx((0.5, 0.2))


def test_a_viewer_who_is_back_before_a_chunk_has_left_has_held_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(timed: TimedStream) -> None:
        timed.turn()
        await timed.leave()
        await timed.pause()
        timed.wait(1.0)  # held
        await timed.resume()
        await timed.pause()
        timed.wait(0.3)
        await timed.resume()
        timed.wait(0.2)
        await timed.leave()

    latency = timed(script, monkeypatch)
    assert (latency["first_frame"], latency["between_chunks_median"]) == pytest.approx((0, 0.5))


STEPS = st.tuples(st.sampled_from(["turn", "leave", "pause", "resume", "play"]), st.integers(0, 5))


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(STEPS, max_size=40))
def test_whatever_happens_the_clock_does_not_run_backwards(steps: list[tuple[str, int]]) -> None:
    async def script(timed: TimedStream) -> None:
        timed.turn()
        await timed.leave()
        for name, seconds in steps:
            timed.wait(seconds)
            outcome = getattr(timed, name)()
            if outcome is not None:
                await outcome

    with pytest.MonkeyPatch.context() as monkeypatch:
        latency = timed(script, monkeypatch)
    assert 0 <= latency["stalled_seconds"] <= sum(seconds for _, seconds in steps)
