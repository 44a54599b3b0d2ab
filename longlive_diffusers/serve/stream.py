"""LiveStream: one viewer's video, while it is made, watched and directed."""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator

import numpy as np

from ..latency import Latency
from ..limits import FPS
from ..pipelines.memory import MemoryShortage
from ..pipelines.pipeline_output import VideoChunk
from ..pipelines.session import StreamingSession
from .encoders import FrameEncoder, frame_encoder
from .memory import memory_in_use
from .messages import Blend, Chunk, Cut, End, Error, FromServer, Prompt, Started
from .metrics import Metrics
from .model import ServedModel, StreamPlan
from .settings import LEAD_CHUNKS


Change = Prompt | Cut | Blend


class LiveStream:
    """
    A stream between `start` and `end`. Its methods belong to the event loop's thread, but for those that say which.

    Args:
        model: What it is made with.
        plan: What the client asked for.
        media: What its frames are sent as, "mp4" or "jpeg".
        metrics: Counts what it does.

    Attributes:
        id: Its name, for the client and the log.
        deadline: When it is ended for having lasted too long.
        end_reason: Why it ends, once it does; see [`messages.End`].
    """

    def __init__(self, model: ServedModel, plan: StreamPlan, media: str, metrics: Metrics):
        self.id = secrets.token_hex(4)
        self._outbox: asyncio.Queue[FromServer | bytes] = asyncio.Queue()  # what is to be sent: a frame is bytes
        self.end_reason: str | None = None
        self.paused = False
        self._latency = Latency(fps=FPS)
        self.num_frames = 0  # sent, or waiting in the outbox
        self.idle_since: float | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self._model, self._plan, self._media, self._metrics = model, plan, media, metrics
        self._loop = asyncio.get_running_loop()
        self._began = 0.0  # when its turn came
        self._held_seconds = 0.0  # since then, in which its viewer wanted no chunk, and none was on its way
        self._num_made = self._num_left = 0  # chunks, or parts of one: made, and encoded
        self._left = 0.0  # when the last one left
        self._last_chunk: float | None = None  # the same since it began, without the time that it was held
        self._played_chunk = 0
        self._next_chunk = 0
        self._changes: deque[Change] = deque()  # which two threads may use at once
        self._session: StreamingSession | None = None
        self._encoder: FrameEncoder | None = None

    # -------------------------------------------------------------------------------------- what a client asks for
    def change(self, change: Change) -> None:
        """Change the prompt from the next chunk on."""
        self._changes.append(change)

    def played(self, frame: int) -> None:
        """Let the stream know what its viewer sees. The frame after the last that was sent stands for that: who counts
        the frames says the same.

        Raises:
            ValueError: For a frame that was not sent.
        """
        if frame > self.num_frames:
            raise ValueError(f"frame {frame} is not there: {self.num_frames} were sent so far.")
        frame = max(0, min(frame, self.num_frames - 1))
        sizes = self._model.pipeline.sizes
        per_chunk = sizes.chunk_size * sizes.temporal_scale
        # The first chunk lacks the frames that the first latent frame does not stand for.
        self._played_chunk = (frame + sizes.temporal_scale - 1) // per_chunk

    def stop(self, reason: str) -> None:
        """End it; a chunk that is being made ends after its current step."""
        if self.end_reason is None:
            self.end_reason = reason
        session = self._session  # the thread that makes chunks may close it meanwhile
        if session is not None:
            session.interrupt()

    # ------------------------------------------------------------------------------------------- what the stage asks
    @property
    def is_over(self) -> bool:
        """Whether it makes no more chunks."""
        return self.end_reason is not None

    @property
    def wants_chunk(self) -> bool:
        """Whether its next chunk may be begun: it is not paused, and its viewer is near enough."""
        return not self.is_over and not self.paused and self._next_chunk - self._played_chunk <= LEAD_CHUNKS

    def note_turn(self, now: float) -> None:
        """Note, at a time, whether it wants a chunk: the time that its viewer holds it is not the server's, but for
        that in which a chunk is still being encoded."""
        if not self.wants_chunk:
            self.idle_since = self.idle_since or now
        elif self.idle_since is not None:
            if self._num_left == self._num_made:
                self._held_seconds += now - max(self.idle_since, self._left)
            self.idle_since = None

    def send(self, message: FromServer | bytes) -> None:
        """Send a message after all that are to be sent already."""
        if isinstance(message, bytes):
            self.num_frames += 1
        self._outbox.put_nowait(message)

    async def messages(self) -> AsyncGenerator[FromServer | bytes, None]:
        """Yield all that is to be sent, as it comes, to the end of the stream."""
        while True:
            message = await self._outbox.get()
            yield message
            if isinstance(message, End):
                return

    def make_chunk(self) -> VideoChunk | None:
        """Make the next chunk; None at the end. Called in the thread that makes the chunks of all streams.

        Raises:
            ValueError: If the stream cannot begin; other errors if it cannot go on.
        """
        if self._session is None:
            self._open()
        assert self._session is not None
        if self.is_over:  # meanwhile
            return None
        # Where it cannot be changed now, an answer says so, and the stream goes on.
        for complaint in self._apply_changes(self._session):
            self._from_thread(Error(complaint))
        chunk = self._model.sessions.advance(self.id)
        if chunk is None or self.is_over:  # what was interrupted is noise still
            return None
        self._next_chunk = chunk.index + 1
        self._num_made += 1
        return chunk

    def encode(self, chunk: VideoChunk) -> None:
        """Encode a chunk, and send each frame as soon as it is encoded. Called in the thread that encodes."""
        assert self._encoder is not None and isinstance(chunk.shot_index, int) and isinstance(chunk.prompt, str)
        frames = chunk.frames[0]
        assert isinstance(frames, np.ndarray)  # as "uint8" is
        message = Chunk(
            index=chunk.index,
            shot_index=chunk.shot_index,
            prompt=chunk.prompt,
            start_frame=chunk.start_frame,
            num_frames=len(frames),
            denoise_seconds=round(chunk.denoise_seconds, 4),
            decode_seconds=round(chunk.decode_seconds, 4),
        )
        self._from_thread(message)
        for index, frame in enumerate(frames):
            if self.end_reason == "gone":  # and nobody is there to see it
                return
            self._from_thread(self._encoder.encode(frame, is_key_frame=index == 0 and chunk.part == 0))
        self._loop.call_soon_threadsafe(self._count, time.monotonic(), len(frames), chunk.part == 0)

    def send_end(self) -> None:
        """Say that it is over. Called in the thread that encodes, after all that was made."""
        self._loop.call_soon_threadsafe(self._send_end)

    def close(self) -> None:
        """Free its caches. Called in the thread that makes the chunks."""
        self._session = None
        self._model.sessions.close(self.id)

    def _open(self) -> None:
        plan, self._began, self._held_seconds = self._plan, time.monotonic(), 0.0
        self._encoder = frame_encoder(self._media, height=plan.height, width=plan.width, fps=FPS)
        self._session = self._model.sessions.open(self.id, plan.pipeline, plan.seed, plan.options)
        self._check_memory(self._session)
        self._from_thread(Started(self.id, plan.seed, FPS, plan.height, plan.width, self._encoder.mime))

    def _check_memory(self, session: StreamingSession) -> None:
        """Raise a MemoryShortage if its caches do not fit into what is free; nothing of them is there yet."""
        needed, free = session.planned_cache_bytes, memory_in_use(self._model.device)["free_bytes"]
        if needed > free:
            self.close()
            raise MemoryShortage(
                f"The KV cache of this stream takes {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free."
            )

    def _apply_changes(self, session: StreamingSession) -> list[str]:
        """Apply what was asked for since the last chunk, and return what was wrong with it."""
        complaints = []
        while self._changes:
            try:
                direct(session, self._changes.popleft())
            except ValueError as error:
                complaints.append(str(error))
        return complaints

    def _count(self, now: float, num_frames: int, begins_chunk: bool) -> None:
        """Count a chunk that has left, or a part of one."""
        self._num_left += 1
        self._left = now
        made = now - self._began - self._held_seconds
        self._latency.add(made, num_frames)
        if self._last_chunk is None:
            self._metrics.measure("first_frame", made)
        elif begins_chunk:
            self._metrics.measure("between_chunks", made - self._last_chunk)
        self._last_chunk = made

    def _send_end(self) -> None:
        assert self.end_reason is not None
        self._metrics.count_end(self.end_reason)
        self.send(End(self.end_reason, self.num_frames, self._latency.as_dict()))

    def _from_thread(self, message: FromServer | bytes) -> None:
        self._loop.call_soon_threadsafe(self.send, message)


def direct(session: StreamingSession, change: Change) -> None:
    """Let a session do what a client asks for."""
    if isinstance(change, Cut):
        session.cut(change.prompt)
    elif isinstance(change, Blend):
        session.blend(change.prompt, chunks=change.chunks)
    else:
        session.prompt = change.prompt
