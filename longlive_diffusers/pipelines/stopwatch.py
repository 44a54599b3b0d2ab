"""How long a stretch of work takes on a device, without waiting for the device meanwhile."""

import time
from typing import Any

import torch


class Stopwatch:
    """
    Begins with the work that is handed to a device next; `stop()` ends it. On a GPU, both are marks in the stream of
    that device that is current at the time: neither what the stream has still to do before counts, nor what comes
    after. Elsewhere, the clock is read.

    Args:
        device: The device that works.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._began = self._ended = self._mark()

    def stop(self) -> None:
        """End with the work that was handed to the device last; stopped again, it ends later."""
        self._ended = self._mark()

    @property
    def seconds(self) -> float:
        """The time between the two; on a GPU, this waits until the work is done."""
        if self._device.type != "cuda":
            return self._ended - self._began
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1000  # of milliseconds

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
