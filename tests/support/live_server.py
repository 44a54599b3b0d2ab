"""A server of `longlive serve` in this process, on a free port, and a client of its protocol."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
import PIL.Image
import torch
from websockets.sync.client import ClientConnection, connect

from longlive_diffusers.assets import toy_lora_path, toy_pipeline_path
from longlive_diffusers.limits import FPS
from longlive_diffusers.models.tiny_decoder import TinyVideoDecoder
from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.serve.access import Access
from longlive_diffusers.serve.app import LiveApp
from longlive_diffusers.serve.encoders import frame_encoder
from longlive_diffusers.serve.model import ServedModel
from longlive_diffusers.serve.server import listen, make_server
from longlive_diffusers.serve.settings import ServeSettings


RED = "a large red circle moves right on a black background"
BLUE = "a large blue circle moves right on a black background"
GREEN = "a large green square moves down on a black background"
PATIENCE = 120  # seconds that a message may take on a busy machine


def embedded_pipeline() -> LongLivePipeline:
    """The embedded model with its LoRA for 4 steps added for good."""
    pipe = LongLivePipeline.from_pretrained(toy_pipeline_path())
    pipe.load_lora_weights(toy_lora_path(4))
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Answer:
    """An answer over HTTP, with the names of its headers in lower case."""

    status: int
    headers: dict[str, str]
    text: str


@dataclass
class LiveServer:
    """A server that runs; `app` may be looked at, its address is `host:port`."""

    app: LiveApp
    host: str
    port: int
    stop: Callable[[], None]

    @property
    def http(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self, path: str = "/ws", **options: Any) -> "LiveClient":
        """Connect to it; `options` are those of `websockets.sync.client.connect`."""
        return LiveClient(f"ws://{self.host}:{self.port}{path}", **options)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something holds that the server brings about by itself."""
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.01)

    @property
    def is_empty(self) -> bool:
        """Whether there are no streams and no connections."""
        health = self.health()
        return health["sessions"] == health["queue"] == health["connections"] == 0

    def health(self) -> dict[str, Any]:
        return json.loads(self.get("/health").text)

    def get(self, path: str) -> "Answer":
        """Ask for a path over HTTP, as it is written."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode())
        finally:
            connection.close()


@contextlib.contextmanager
def running_server(
    pipelines: Mapping[str | None, LongLivePipeline],
    settings: ServeSettings | None = None,
    access: Access | None = None,
    decoder: TinyVideoDecoder | None = None,
) -> Iterator[LiveServer]:
    """Run a server of these pipelines in a thread."""
    listener = listen("127.0.0.1", 0)

    def choose(steps: int, guidance_scale: float) -> str | None:
        return f"{steps} steps" if f"{steps} steps" in pipelines else None

    model = ServedModel("the embedded model", dict(pipelines), choose, decoder=decoder)
    app = LiveApp(model, settings, access=access)
    server = make_server(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    host, port = listener.getsockname()

    def stop() -> None:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"

    try:
        while not server.started:
            time.sleep(0.01)
        yield LiveServer(app, host, port, stop)
    finally:
        stop()


@dataclass
class Received:
    """What came of a stream: its messages, and the binary messages after each `chunk`."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    media: list[bytes] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The messages of a type."""
        return [message for message in self.messages if message["type"] == kind]

    @property
    def frames(self) -> np.ndarray:
        """The frames, `[F, H, W, 3]`, uint8."""
        return decoded(self.media)


class LiveClient:
    """A client of the protocol, connected to an address with the options of `websockets.sync.client.connect`."""

    def __init__(self, url: str, **options: Any):
        options = {"max_size": None, "compression": None, "open_timeout": PATIENCE, **options}
        self.socket: ClientConnection = contextlib.ExitStack().enter_context(connect(url, **options))
        self.received = Received()

    def __enter__(self) -> "LiveClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def vanish(self) -> None:
        """End the connection without a word, with a reset."""
        raw = self.socket.socket
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.shutdown(socket.SHUT_RDWR)
        raw.close()

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def next(self) -> dict[str, Any] | bytes:
        """Return the next message, which is also kept."""
        data = self.socket.recv(PATIENCE)
        if isinstance(data, bytes):
            self.received.media.append(data)
            return data
        message = json.loads(data)
        self.received.messages.append(message)
        return message

    def until(self, kind: str, *, plays: bool = True) -> dict[str, Any]:
        """Receive up to a message of this type, and say of every frame, where it `plays`, that it is on the screen."""
        while True:
            message = self.next()
            if isinstance(message, dict):
                if message["type"] == kind:
                    return message
            elif plays:
                self.send("played", frame=len(self.received.media) - 1)

    def whole_chunk(self) -> dict[str, Any]:
        """Receive up to the end of the next chunk, without playing it."""
        chunk = self.until("chunk", plays=False)
        for _ in range(chunk["num_frames"]):
            assert isinstance(self.next(), bytes)
        return chunk

    def watch(self, **start: Any) -> Received:
        """Start a stream, and play it to its end."""
        self.received = Received()
        self.send("start", **start)
        self.until("end")
        return self.received


def decoded(media: list[bytes]) -> np.ndarray:
    """Decode what was received: fragments of an mp4 or pictures."""
    if media[0][:3] == b"\xff\xd8\xff":
        return np.stack([np.asarray(PIL.Image.open(io.BytesIO(picture))) for picture in media])
    with av.open(io.BytesIO(b"".join(media))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def expected_media(
    pipe: LongLivePipeline, prompt: str, seed: int, num_chunks: int, media: str = "mp4", **options
) -> list[bytes]:
    """What a server sends of a stream, made here without one."""
    encoder, sent = None, []
    options = {"generator": torch.Generator().manual_seed(seed), "output_type": "uint8", **options}
    direct = options.pop("direct", lambda session, index: None)
    with pipe.stream(prompt, **options) as session:
        for index in range(num_chunks):
            direct(session, index)
            frames = next(session).frames[0]
            height, width = frames.shape[1:3]
            encoder = encoder or frame_encoder(media, height=height, width=width, fps=FPS)
            sent += [encoder.encode(frame, is_key_frame=i == 0) for i, frame in enumerate(frames)]
    return sent


def as_data_url(image: PIL.Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
