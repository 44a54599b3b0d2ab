"""`--devices N`: one process for each device, which make one video together.

The command starts itself N times with torch's elastic launcher; `torchrun -m longlive_diffusers.cli ...` does the same
on several machines. The first process, rank 0, reads what is typed, prints, and writes the file. Ctrl-C is its to act
on; the others follow it, and end when it does.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..parallel.layout import check_heads
from ..parallel.stream_config import StreamParallelConfig
from ..pipelines.pipeline_longlive import LongLivePipeline
from .device import available_devices


@dataclass(frozen=True)
class Rank:
    """This process among those that make the video: its place, how many there are, and which it is on its machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process reads, prints and writes."""
        return self.index == 0

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this process, of the kind of `device`."""
        return device if self.count == 1 or device.type == "cpu" else torch.device(device.type, self.local_index)

    def join(self, pipe: LongLivePipeline, device: torch.device) -> None:
        """Share the pipeline's streams with the other processes."""
        if self.count == 1:
            return
        if device.type != "cpu":
            torch.accelerator.set_device_index(self.local_index)
        dist.init_process_group("gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device))
        pipe.transformer.enable_parallelism(config=StreamParallelConfig(ulysses_degree=self.count))


def own_rank() -> Rank:
    """Return this process's place, as torch's launcher has told it; without one, it is alone."""
    if not dist.is_torchelastic_launched():
        return Rank()
    return Rank(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def check_devices(count: int, device: torch.device, num_heads: int) -> None:
    """
    Check `--devices` before anything is started or loaded.

    Raises:
        ValueError: If there are not so many devices, they cannot share the heads, or a launcher has started another
            number of processes.
    """
    rank = own_rank()
    if rank.count > 1:
        if count not in (1, rank.count):
            raise ValueError(f"--devices is {count}, but {rank.count} processes were started: leave it out")
        count = rank.count
    if count == 1:
        return
    check_heads(num_heads, count)
    if device.index is not None:
        raise ValueError(
            f"--device {device} is one device, and --devices asks for {count}: say --device {device.type}"
        )
    there = available_devices().get(device.type, 0)
    if device.type != "cpu" and rank.count == 1 and count > there:
        raise ValueError(f"--devices is {count}, but there are only {there} of '{device.type}' here")


def start_ranks(argv: Sequence[str], count: int) -> int:
    """
    Run `longlive ARGV` in as many processes, and return the exit status of the first or, if another one failed by
    itself, its own. When one fails, all are ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said by who failed
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "longlive_diffusers.cli", *argv)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"longlive: error: process {rank} of {count} was ended by {name}", file=sys.stderr)
            return 1
        return failure.exitcode
    return 0
