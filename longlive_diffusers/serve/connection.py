"""One WebSocket: messages in, messages and video out; a stream at a time."""

import asyncio
import contextlib
import time

from starlette.websockets import WebSocket, WebSocketDisconnect

from .messages import (
    Blend,
    Cut,
    Error,
    FromClient,
    FromServer,
    Pause,
    Played,
    Prompt,
    Resume,
    Start,
    Stop,
    parse_message,
    to_json,
)
from .model import ServedModel
from .settings import MESSAGE_BURST, MESSAGES_PER_SECOND, PLAYED_COUNTS, SEND_SECONDS
from .stage import Stage
from .stream import LiveStream


# Close codes: a client that does not keep to the rules, and a server that stops.
TOO_MANY_MESSAGES, SERVICE_RESTART = 1008, 1012
CLOSED = (WebSocketDisconnect, RuntimeError)  # what starlette raises where the socket has been closed


class Connection:
    """
    A client, from the moment that it is let in.

    Args:
        websocket: The socket, accepted.
        model: What streams are made with.
        stage: Where they are made.
    """

    def __init__(self, websocket: WebSocket, model: ServedModel, stage: Stage):
        self._websocket, self._model, self._stage = websocket, model, stage
        self._stream: LiveStream | None = None
        self._sender: asyncio.Task | None = None
        self._life = asyncio.timeout(None)  # ends when the client is found to be gone
        self._allowance, self._counted = float(MESSAGE_BURST), time.monotonic()
        self._sending = asyncio.Lock()

    async def serve(self) -> None:
        """Answer what the client sends, until it goes."""
        try:
            async with self._life:
                await self._converse()
        except (*CLOSED, TimeoutError):
            pass
        finally:
            self._leave()

    async def close(self) -> None:
        """Let the client go, after all that its stream has to say."""
        if self._sender is not None:
            await asyncio.wait([self._sender])
        with contextlib.suppress(*CLOSED):
            await self._websocket.close(SERVICE_RESTART)

    async def _converse(self) -> None:
        while (event := await self._websocket.receive())["type"] == "websocket.receive":
            message, complaint = None, ""
            try:
                message = read_message(event.get("text"))
            except ValueError as error:
                complaint = str(error)
            if not self._is_within_limits(message):
                await self._send(Error(f"More than {MESSAGES_PER_SECOND:g} messages a second; this is the end."))
                await self._websocket.close(TOO_MANY_MESSAGES)
                return
            if message is not None:
                complaint = await self._handle(message)
            if complaint:
                await self._send(Error(complaint))

    async def _handle(self, message: FromClient) -> str:
        """Do what a client asks for, and return what is wrong with it; nothing if it is right."""
        try:
            await self._do(message)
        except ValueError as error:
            return str(error)
        return ""

    async def _do(self, message: FromClient) -> None:
        if isinstance(message, Start):
            await self._start(message)
            return
        stream = self._stream
        if stream is None or stream.is_over:
            if isinstance(message, Played | Stop):  # on the way when the stream ended
                return
            raise ValueError("There is no stream; start one.")
        if isinstance(message, Prompt | Cut | Blend):
            stream.change(message)
        elif isinstance(message, Played):
            stream.played(message.frame)
        elif isinstance(message, Stop):
            self._stage.stop(stream, "stopped")
        elif isinstance(message, Pause | Resume):
            stream.paused = isinstance(message, Pause)
        self._stage.wake()

    async def _start(self, start: Start) -> None:
        if self._sender is not None and not self._sender.done():
            raise ValueError("There is a stream already; stop it, and wait for its end, before another one.")
        plan = await self._stage.plan(self._model, start)
        self._stream = LiveStream(self._model, plan, start.video, self._stage.metrics)
        self._stage.enter(self._stream)
        self._sender = asyncio.create_task(self._send_stream(self._stream))

    async def _send_stream(self, stream: LiveStream) -> None:
        """Send what a stream has to say, to its end."""
        try:
            async for message in stream.messages():
                await self._send(message)
        except CLOSED:
            pass
        finally:
            self._stage.stop(stream, "gone")

    async def _send(self, message: FromServer | bytes) -> None:
        """Send a message; a client that does not take it for long is let go."""
        async with self._sending:
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    if isinstance(message, bytes):
                        await self._websocket.send_bytes(message)
                    else:
                        await self._websocket.send_text(to_json(message))
            except TimeoutError:
                self._life.reschedule(0)  # for the task that waits for what the client says
                raise WebSocketDisconnect(1006) from None

    def _is_within_limits(self, message: FromClient | None) -> bool:
        """Count a message, and return whether its sender is within what is allowed."""
        now = time.monotonic()
        self._allowance = min(MESSAGE_BURST, self._allowance + (now - self._counted) * MESSAGES_PER_SECOND)
        self._counted = now
        self._allowance -= PLAYED_COUNTS if isinstance(message, Played) else 1
        return self._allowance >= 0

    def _leave(self) -> None:
        if self._stream is not None:
            self._stage.stop(self._stream, "gone")
        if self._sender is not None:
            self._sender.cancel()


def read_message(text: str | None) -> FromClient:
    """
    Read what a client sent, None for a binary message.

    Raises:
        ValueError: As [`messages.parse_message`] does, and of a binary message.
    """
    if text is None:
        raise ValueError("Messages are text, in JSON; this one is binary.")
    return parse_message(text)
