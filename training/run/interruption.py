"""Ctrl-C and SIGTERM: a run that is asked to end finishes its update, writes a checkpoint, and says how to go on."""

import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator

from longlive_diffusers.signal_handling import handled


logger = logging.getLogger("interruption")


class StopRequest:
    """
    While its block runs, notes the first SIGINT or SIGTERM, which then does nothing else; a second one ends the
    process as always.

    Args:
        accelerator: The accelerator of the run; its processes agree on when to stop.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signal = accelerator, 0
        self._handlers = ExitStack()

    def __enter__(self) -> "StopRequest":
        self._handlers.enter_context(handled((signal.SIGINT, signal.SIGTERM), self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def unless_requested(self, fetch: Callable[[], list]) -> list:
        """Return what `fetch` returns; nothing if it fails because the signal also ended processes that read data."""
        try:
            return fetch()
        except RuntimeError:
            if not self.signal:
                raise
            return []

    def agreed(self) -> int:
        """Return the signal that some process got, or 0. Every process has to call this, at the same update."""
        number = torch.tensor(float(self.signal), device=self.accelerator.device)
        return int(self.accelerator.gather(number).max())

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._handlers.close()


def ignore_stop_requests(_: int) -> None:
    """Let a process that reads data outlive Ctrl-C, and end without an error on SIGTERM, both of which often go to all
    processes of a run: the main one decides. Give this to a DataLoader as `worker_init_fn`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def end_with_result(accelerator: Accelerator, signal_number: int) -> NoReturn:
    """End a run that was asked to when its last update was done; its result has been saved."""
    if accelerator.is_main_process:
        name = signal.Signals(signal_number).name
        logger.warning("ended by %s; the result is saved, what would have come after it was left out", name)
    accelerator.end_training()
    raise SystemExit(128 + signal_number)


def end_early(accelerator: Accelerator, signal_number: int, step: int, max_train_steps: int) -> NoReturn:
    """End a run that was asked to, after `step` updates, of which a checkpoint has been written, unless it is 0."""
    name = signal.Signals(signal_number).name
    how = "go on with --resume_from_checkpoint latest" if step else "nothing was trained yet"
    if accelerator.is_main_process:
        logger.warning("ended by %s after update %d of %d; %s", name, step, max_train_steps, how)
    accelerator.end_training()
    raise SystemExit(128 + signal_number)
