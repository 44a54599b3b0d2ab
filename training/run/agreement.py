"""What processes have to agree on: that each of them is part of one run, and what one of them looked up for all."""

import os
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


Result = TypeVar("Result")


def check_processes(accelerator: Accelerator) -> None:
    """
    Check that processes that were started together know of each other.

    Raises:
        ValueError: If each of them would be a run of its own, in the same folder. Accelerate starts them so on a CPU,
            unless it is told to use one.
    """
    # Both are set by whoever started the processes; WORLD_SIZE alone may also be left in a shell.
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if accelerator.num_processes < started:
        raise ValueError(
            f"{started} processes were started, but each of them would be a run of its own; to train on the CPU with "
            "several processes, set the environment variable ACCELERATE_USE_CPU=true"
        )


def on_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """
    Let the main process do something, and return its result in all processes. Every process has to call this.

    Raises:
        ValueError, OSError: What the work raised in the main process; in the others, a ValueError that says the same.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except (ValueError, OSError) as error:
            broadcast_object_list([None, str(error)])
            raise
    broadcast_object_list(outcome)
    result, message = outcome
    if message is not None:
        raise ValueError(message)
    return result
