"""The ASGI application: the page, health and metrics over HTTP, and streams over a WebSocket."""

import asyncio
import contextlib
import logging
import mimetypes
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib.resources import files

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from ..version import __version__
from .access import Access
from .connection import Connection
from .memory import memory_in_use
from .model import ServedModel, default_size
from .settings import MAX_CONNECTIONS, ServeSettings
from .stage import Stage
from .stream import LiveStream


logger = logging.getLogger(__name__)

# The page loads nothing from elsewhere, and no page shows it in a frame but those of the origins that may use it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors "
)
PAGE_HEADERS = {
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
_PACKAGE = "longlive_diffusers.serve"
MEMORY_TEXTS = {
    "used_bytes": "Memory that this process uses: of the GPU, or on a CPU of the machine.",
    "free_bytes": "Memory that is free there.",
    "total_bytes": "Memory that there is.",
}
TRY_AGAIN_LATER = 1013  # a close code


class LiveApp:
    """
    An application that makes streams of one model. `LiveApp(...).asgi` is what an ASGI server runs; any number of
    clients share the model.

    Args:
        model: What streams are made with.
        settings: What the server allows, and its defaults.
        access: Who may use it.
        on_failure: Called when it can make no stream any more.

    Raises:
        ValueError: If the settings allow less than a picture of the model's shape.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: ServeSettings | None = None,
        *,
        access: Access | None = None,
        on_failure: Callable[[], object] = lambda: None,
    ):
        self.model, self.settings = model, settings or ServeSettings()
        self.access = access or Access()
        self._default_size = default_size(model.pipeline.sizes, self.settings.max_pixels)
        self.has_failed = False  # whether no stream can be made any more
        self._on_failure = on_failure
        self._stage: Stage | None = None  # while it runs
        self._connections: set[Connection] = set()
        headers = {**PAGE_HEADERS, "content-security-policy": POLICY + (" ".join(self.access.origins) or "'none'")}
        page = [Route(path, _file(name, headers)) for path, name in _page_files().items()]
        routes = [
            *page,
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            WebSocketRoute("/ws", self._websocket),
        ]
        self.asgi = Starlette(routes=routes, lifespan=self._lifespan)

    @property
    def streams(self) -> list[LiveStream]:
        """The streams that are being made, and those that wait for a place."""
        return [] if self._stage is None else self._stage.streams

    async def end_streams(self) -> None:
        """End all streams, each with a message; no other can begin."""
        if self._stage is not None:
            await self._stage.close()

    async def close(self) -> None:
        """End all streams, each with a message, and close all connections after it."""
        await self.end_streams()
        await asyncio.gather(*[connection.close() for connection in self._connections])

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None, None]:
        self._stage = stage = Stage(self.model.sessions, self.settings, self._fail)
        running = asyncio.create_task(stage.run())
        running.add_done_callback(self._look_at_end)
        try:
            yield
        finally:
            await stage.close()
            await running
            self._stage = None

    def _fail(self) -> None:
        self.has_failed = True
        self._on_failure()

    def _look_at_end(self, running: asyncio.Task) -> None:
        """A mistake in the stage itself would leave all streams without a word."""
        if not running.cancelled() and running.exception() is not None:
            logger.error("no stream can be made any more", exc_info=running.exception())
            self._fail()

    async def _websocket(self, websocket: WebSocket) -> None:
        refusal = self.access.refusal(websocket.headers, websocket.query_params)
        if refusal is not None:
            logger.info("a connection was refused: %s", refusal)
            await websocket.close()  # before it is accepted: the answer is 403
            return
        await websocket.accept()
        if len(self._connections) >= MAX_CONNECTIONS or self._stage is None or self.has_failed:
            await websocket.close(TRY_AGAIN_LATER)
            return
        connection = Connection(websocket, self.model, self._stage)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    async def _health(self, request: Request) -> Response:
        stage, used = self._stage, memory_in_use(self.model.device)
        height, width = self._default_size
        ready = stage is not None and not self.has_failed
        return JSONResponse(
            {
                "ready": ready,
                "version": __version__,
                "model": self.model.name,
                "device": str(self.model.device),
                "height": height,
                "width": width,
                "steps": self.settings.steps,
                "guidance_scale": self.settings.guidance_scale,
                "sessions": 0 if stage is None else stage.num_streams,
                "max_sessions": self.settings.max_sessions,
                "queue": 0 if stage is None else stage.num_waiting,
                "max_queue": self.settings.max_queue,
                "connections": len(self._connections),
                "memory": used,
                "token_required": self.access.token is not None,
            },
            status_code=200 if ready else 503,
        )

    async def _metrics(self, request: Request) -> Response:
        if self.access.refusal(request.headers, request.query_params) is not None:
            return PlainTextResponse("A token is needed.\n", status_code=403)
        stage = self._stage
        if stage is None:
            return PlainTextResponse("The server stops.\n", status_code=503)
        used = memory_in_use(self.model.device)
        gauges = {
            "streams": (stage.num_streams, "Streams that are being made."),
            "streams_waiting": (stage.num_waiting, "Streams that wait for a place."),
            "connections": (len(self._connections), "Open WebSockets."),
            **{f"memory_{name}": (value, MEMORY_TEXTS[name]) for name, value in used.items()},
        }
        return PlainTextResponse(stage.metrics.as_text(gauges), media_type="text/plain; version=0.0.4")


def _page_files() -> dict[str, str]:
    """Return the files of the page, by the paths that they are served under."""
    names = sorted(file.name for file in (files(_PACKAGE) / "page").iterdir() if file.is_file())
    return {"/" if name == "index.html" else f"/{name}": name for name in names}


def _file(name: str, headers: dict[str, str]) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint that answers with a file of the page."""
    content = (files(_PACKAGE) / "page" / name).read_bytes()
    media_type = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]

    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return answer
