"""Streams and events that remember what was ordered before what, in place of those of a GPU.

`happens(name)` is a piece of work on the current stream. A stream knows the work that is certain to be done when its
own next piece begins: its earlier pieces, and what it was told to wait for. Whether two pieces race is then a question
to a set, on any machine.
"""

import threading
from contextlib import contextmanager

import pytest
import torch


class FakeStream:
    """A stream; all are listed in `created`."""

    created: list["FakeStream"] = []

    def __init__(self, device: torch.device | str):
        self.device, self.done = torch.device(device), set()
        FakeStream.created.append(self)

    def wait_stream(self, other: "FakeStream") -> None:
        self.done |= other.done

    def wait_event(self, event: "FakeEvent") -> None:
        self.done |= event.done


class FakeEvent:
    def record(self, stream: FakeStream | None = None) -> None:
        self.done = set((stream or current_stream()).done)


class _Current(threading.local):
    """Like CUDA's: every thread has a current stream of its own, and by default it is the same one."""

    def __init__(self):
        self.streams: list[FakeStream] = []


_current, _default = _Current(), FakeStream("cuda")


def current_stream(device: torch.device | str = "cuda") -> FakeStream:
    return _current.streams[-1] if _current.streams else _default


@contextmanager
def stream(chosen: FakeStream):
    _current.streams.append(chosen)
    try:
        yield
    finally:
        _current.streams.pop()


def happens(name) -> None:
    """Do a piece of work on the current stream."""
    current_stream().done.add(name)


def known() -> set:
    """The work that is done when the current stream goes on."""
    return current_stream().done


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, FakeStream]]:
    """Put the streams in place of CUDA's; return a list of which tensors are kept for which streams
    (`record_stream`), which grows with every call."""
    kept = []
    _default.done.clear()
    FakeStream.created.clear()
    monkeypatch.setattr("torch.cuda.Stream", FakeStream)
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr("torch.cuda.stream", stream)
    monkeypatch.setattr("torch.cuda.current_stream", current_stream)
    monkeypatch.setattr("torch.Tensor.record_stream", lambda tensor, stream: kept.append((tensor, stream)))
    return kept
