"""What callbacks read and change through the pipeline: the state of the session that called them.

A pipeline serves any number of sessions, in any number of threads, while diffusers' callbacks know only the pipeline:
they read `pipe.guidance_scale` and write `pipe._interrupt`. So the pipeline shows each thread the state of the session
that this thread is advancing.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class RunState:
    """The state of one session. A callback may change the guidance scale, the attention arguments and `interrupt`,
    through the pipeline's properties; `closed` is for the session alone, so that no callback can undo it."""

    guidance_scale: float
    num_timesteps: int
    attention_kwargs: dict[str, Any] | None
    current_timestep: torch.Tensor | None = None
    interrupt: bool = False
    closed: bool = False

    @property
    def is_ending(self) -> bool:
        """Whether the chunk in progress, after its current step, is the last."""
        return self.interrupt or self.closed

    def close(self) -> None:
        """End the chunk in progress after its current step; nobody will have it."""
        self.closed = True


class _OfThread(threading.local):
    run: RunState | None = None


class RunView:
    """The state that a pipeline shows: in a thread that is advancing a session (and so in its callbacks) that
    session's, elsewhere that of the session that was advanced last. A copy of a pipeline begins with a view of its
    own."""

    def __init__(self):
        self._own = _OfThread()
        self._latest = RunState(guidance_scale=1.0, num_timesteps=0, attention_kwargs=None)

    @property
    def current(self) -> RunState:
        return self._own.run or self._latest

    @contextmanager
    def showing(self, run: RunState) -> Iterator[None]:
        """Show `run` in this thread; afterwards, what was shown before: a callback may advance another session."""
        previous, self._own.run, self._latest = self._own.run, run, run
        try:
            yield
        finally:
            self._own.run, self._latest = previous, run

    def __getstate__(self) -> dict:
        return {}  # what belongs to a thread can be neither copied nor pickled

    def __setstate__(self, state: dict) -> None:
        self.__init__()
