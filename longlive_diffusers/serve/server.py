"""Running the application: a socket, uvicorn, and an end at which every stream gets to know that it is over."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Generator

import uvicorn

from ..signal_handling import handled
from .app import LiveApp
from .messages import MAX_IMAGE_BYTES


LARGEST_MESSAGE = 4 * -(-MAX_IMAGE_BYTES // 3) + 64 * 1024  # a picture in base64, and a prompt
GRACE_SECONDS = 10  # what clients have to take what is on the way, when the server stops


def listen(host: str, port: int) -> socket.socket:
    """
    Return a socket that listens, so that an address in use is known before models are loaded.

    Raises:
        ValueError: If `host` is no address of this machine, or something else listens there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # a name that is no name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"cannot listen on host '{host}', port {port}: {reason}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the address of the page."""
    address, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, str(address))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: LiveApp) -> "LiveServer":
    """Return a server of the application; `run(sockets=[listener])` runs it."""
    config = uvicorn.Config(
        app.asgi,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=LARGEST_MESSAGE,
        ws_per_message_deflate=False,  # video does not become smaller
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return LiveServer(config, app)


class LiveServer(uvicorn.Server):
    """A server that ends all streams, each with a message, before it closes their connections."""

    def __init__(self, config: uvicorn.Config, app: LiveApp):
        super().__init__(config)
        self._app = app

    def stop(self) -> None:
        """End; callable from the event loop."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._app.close(), GRACE_SECONDS)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """End on a terminal that closes (SIGHUP) as on the signals that uvicorn knows, which raises them again at its
        end."""
        with super().capture_signals():
            is_main = threading.current_thread() is threading.main_thread()
            if not is_main or not hasattr(signal, "SIGHUP"):
                yield
                return
            with handled([signal.SIGHUP], self.handle_exit):
                yield
