"""One WebSocket, of which the test is both ends: what is counted, and when it is let go."""

import asyncio
import json
from typing import Any, cast

import pytest
from starlette.websockets import WebSocket

from longlive_diffusers.serve.connection import Connection
from longlive_diffusers.serve.settings import MESSAGE_BURST, ServeSettings
from longlive_diffusers.serve.stage import Stage
from tests.support.fake_sessions import FakeSessions, as_sessions, fake_model


class FakeWebSocket:
    """A socket; `takes` says whether its client takes binary messages."""

    def __init__(self, events: list[dict[str, Any]], *, takes: bool = True):
        self._events, self._takes = events, takes
        self.texts: list[dict[str, Any]] = []
        self.code: int | None = None

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        return self._events.pop(0) if self._events else await asyncio.Future()

    async def send_text(self, text: str) -> None:
        self.texts.append(json.loads(text))

    async def send_bytes(self, data: bytes) -> None:
        if not self._takes:
            await asyncio.Future()

    async def close(self, code: int) -> None:
        self.code = code


def connection(socket: FakeWebSocket, stage: Stage, sessions: FakeSessions) -> Connection:
    return Connection(cast(WebSocket, socket), fake_model(sessions), stage)


def said(message: str | bytes) -> dict[str, Any]:
    """The event of a message."""
    return {"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message}


@pytest.mark.parametrize("message", [b"\x00", b"", "", "nonsense", "[]", '{"type": "resume"}', '{"type": "stop"}'])
def test_messages_of_every_kind_are_counted(message: str | bytes) -> None:
    async def run() -> FakeWebSocket:
        socket, sessions = FakeWebSocket(10 * MESSAGE_BURST * [said(message)]), FakeSessions()
        stage = Stage(as_sessions(sessions), ServeSettings())
        async with asyncio.timeout(10):
            await connection(socket, stage, sessions).serve()
        return socket

    socket = asyncio.run(run())
    assert socket.code == 1008 and "More than 100 messages a second" in socket.texts[-1]["message"]


def test_a_client_that_takes_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may say nothing either, so that nothing else would ever tell."""
    monkeypatch.setattr("longlive_diffusers.serve.connection.SEND_SECONDS", 0.01)

    async def run() -> None:
        start = said(json.dumps({"type": "start", "prompt": "a", "video": "jpeg"}))
        socket, sessions = FakeWebSocket([start], takes=False), FakeSessions()
        stage = Stage(as_sessions(sessions), ServeSettings())
        running = asyncio.create_task(stage.run())
        async with asyncio.timeout(10):
            await connection(socket, stage, sessions).serve()
        await stage.close()
        await running
        assert stage.streams == [] and 'reason="gone"} 1' in stage.metrics.as_text({})

    asyncio.run(run())
