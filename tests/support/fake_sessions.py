"""Streams without a model: what a stage and its connections do with them, at the moment that a test wants."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from longlive_diffusers.pipelines.pipeline_output import VideoChunk
from longlive_diffusers.serve.metrics import Metrics
from longlive_diffusers.serve.model import ServedModel, StreamPlan
from longlive_diffusers.serve.sessions import Sessions
from longlive_diffusers.serve.stream import LiveStream


PLAN = StreamPlan(None, height=16, width=16, seed=1, options={})


class FakeSession:
    """A session that makes no video."""

    planned_cache_bytes = 100
    prompt = "a"

    def interrupt(self) -> None:
        pass


class FakeSessions:
    """
    Sessions of `FakeSession`; each chunk has one gray frame of 16 x 16.

    Args:
        on_open, on_advance: Called, in the thread that makes chunks, where a session is opened, or a chunk made.

    Attributes:
        num_ends: How often the other ranks were let go.
    """

    def __init__(self, on_open: Callable = lambda: None, on_advance: Callable = lambda: None):
        self._on_open, self._on_advance = on_open, on_advance
        self._next: dict[str, int] = {}
        self.num_ends = 0

    def open(self, name: str, pipeline: str | None, seed: int, options: dict[str, Any]) -> FakeSession:
        self._on_open()
        self._next[name] = 0
        return FakeSession()

    def advance(self, name: str) -> VideoChunk:
        self._on_advance()
        index, self._next[name] = self._next[name], self._next[name] + 1
        frames = np.full((1, 1, 16, 16, 3), 127, np.uint8)
        return VideoChunk(frames, torch.empty(0), index, shot_index=0, prompt="a", start_frame=index)

    def close(self, name: str) -> None:
        self._next.pop(name, None)

    def end(self) -> None:
        self.num_ends += 1


def as_sessions(sessions: FakeSessions) -> Sessions:
    """Return them as what takes their place."""
    return cast(Sessions, sessions)


def fake_model(sessions: FakeSessions | None = None) -> ServedModel:
    """Return a model of these sessions, for which each frame is a chunk."""
    model = SimpleNamespace(
        sessions=sessions or FakeSessions(),
        pipeline=SimpleNamespace(sizes=SimpleNamespace(chunk_size=1, temporal_scale=1)),
        device=torch.device("cpu"),
        plan=lambda start, settings: PLAN,
    )
    return cast(ServedModel, model)


def fake_stream(sessions: FakeSessions | None = None, *, paused: bool = False) -> LiveStream:
    """Return a stream of these sessions, in the event loop that runs."""
    stream = LiveStream(fake_model(sessions), PLAN, "jpeg", Metrics())
    stream.paused = paused
    return stream
