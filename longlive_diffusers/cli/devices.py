"""`--devices N`: one process for each device, which make one video together.

The command starts itself N times with torch's elastic launcher; `torchrun -m longlive_diffusers.cli ...` does the same
on several machines. The first process, rank 0, reads what is typed, prints, and writes the file. Ctrl-C is its to act
on; the others follow it, and end when it does. A process that fails says why; the launcher says so for one that could
not, and ends the rest.
"""

import logging
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ..parallel.layout import check_heads
from ..parallel.stream_config import StreamParallelConfig
from ..pipelines.pipeline_longlive import LongLivePipeline
from .device import available_devices
from .launched import Rank, own_rank


def device_of(rank: Rank, device: torch.device) -> torch.device:
    """Return the device of one of the processes, of the kind of `device`."""
    return device if rank.count == 1 or device.type == "cpu" else torch.device(device.type, rank.local_index)


def prepare(rank: Rank, device: torch.device) -> None:
    """Work on this process's device from now on, and leave the others of its machine their part of the cores."""
    if rank.count > 1 and device.type != "cpu":
        torch.accelerator.set_device_index(rank.local_index)
    if not dist.is_initialized():  # once
        torch.set_num_threads(max(1, torch.get_num_threads() // rank.local_count))


def share(pipe: LongLivePipeline, rank: Rank, device: torch.device) -> None:
    """Share the pipeline's streams with the other processes, if there are any."""
    if rank.count == 1:
        return
    if not dist.is_initialized():  # several pipelines may be shared
        dist.init_process_group("gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device))
    pipe.transformer.enable_parallelism(config=StreamParallelConfig(ulysses_degree=rank.count))


def check_devices(count: int, device: torch.device, num_heads: int) -> int:
    """
    Check `--devices` before anything is started or loaded.

    Returns:
        How many devices make the video: what was asked for, or what a launcher has started.

    Raises:
        ValueError: If there are not so many devices, they cannot share the heads, or a launcher has started another
            number of processes.
    """
    rank, needed = own_rank(), count
    if rank.count > 1:
        if count not in (1, rank.count):
            raise ValueError(f"--devices is {count}, but {rank.count} processes were started: leave it out")
        count, needed = rank.count, rank.local_count
    if count == 1:
        return count
    check_heads(num_heads, count)
    if device.index is not None:
        raise ValueError(
            f"--device {device} is one device, and --devices asks for {count}: say --device {device.type}"
        )
    there = available_devices().get(device.type, 0)
    if device.type != "cpu" and needed > there:
        raise ValueError(f"{needed} devices are asked for, but there are only {there} of '{device.type}' here")
    return count


def start_ranks(argv: Sequence[str], count: int) -> int:
    """
    Run `longlive ARGV` in as many processes, and return the exit status of the first or, if another one failed by
    itself, its own. When one fails, all are ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    logging.disable()  # what failed is said by who failed; the launcher's own loggers know no common level
    try:
        elastic_launch(config, sys.executable)("-m", "longlive_diffusers.cli", *argv)
    except SignalException as error:
        if error.sigval != signal.SIGINT:  # of which the first process has told
            print(f"longlive: ended by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval
    except ChildFailedError as error:
        return exit_status({rank: failure.exitcode for rank, failure in error.failures.items()}, count)
    finally:
        logging.disable(logging.NOTSET)
    return 0


def exit_status(statuses: Mapping[int, int], count: int) -> int:
    """Say which process was ended by a signal, since it could not, and return the exit status of all. The first of
    the statuses is that of the process that failed first; the launcher then ends the others with SIGTERM."""
    for rank, status in statuses.items():
        if status < 0 and -status != signal.SIGTERM:
            name = signal.Signals(-status).name
            print(f"longlive: error: process {rank} of {count} was ended by {name}", file=sys.stderr)
            return 1
    rank, status = next(iter(statuses.items()))
    if status < 0:
        print(f"longlive: error: process {rank} of {count} was ended by SIGTERM", file=sys.stderr)
        return 1
    return status
