"""Runs of `train_ar.py` and `train_dmd.py` with FSDP2 on gloo ranks, one after another, as a JSON file describes them.

    python tests/programs/train_with_fsdp2.py RUNS.json

Ranks are forked from this process, which has imported everything: a run then starts within a second. What runs is
the script's `main`; only its Accelerator is told that FSDP2 was asked for, see `tests/support/fsdp2_on_cpu.py`.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule

import train_ar
import train_dmd
from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.models.transformer_longlive import LongLiveTransformerBlock
from run import processes
from run.arguments import parse_arguments
from run.distillation_arguments import parse_distillation_arguments
from run.log import read_log
from tests.support.fsdp2_on_cpu import use_fsdp2


SCRIPTS = {"train_ar": (train_ar, parse_arguments), "train_dmd": (train_dmd, parse_distillation_arguments)}


@dataclass(frozen=True)
class Run:
    """
    Args:
        words: The command line of the script.
        ranks: The number of processes; one process trains without FSDP2.
        cp_size: How many of them share a clip.
        mixed_precision: As in accelerate's configuration.
        kill_after: The update after which all ranks are killed; None to let them finish.
        script: The script's name.
        arrivals: Where rank r writes what its network was given, `<arrivals>-r.json`; None for nowhere.
    """

    words: list[str]
    ranks: int = 1
    cp_size: int = 1
    mixed_precision: str = "no"
    kill_after: int | None = None
    script: str = "train_ar"
    arrivals: str | None = None

    @property
    def log(self) -> Path:
        _, parse = SCRIPTS[self.script]
        return Path(parse(self.words).run.output_dir) / "training_log.jsonl"


class Arrivals:
    """What reaches the network: dtypes by name, and the values of timesteps and positions in training."""

    def __init__(self):
        self.dtypes: dict[str, list[str]] = {}
        self.values: dict[str, list[float]] = {}

    def note_dtype(self, name: str, dtype: torch.dtype | None) -> None:
        self.dtypes[name] = sorted({*self.dtypes.get(name, []), str(dtype)})

    def note_values(self, name: str, values: list[float]) -> None:
        self.values[name] = sorted({*self.values.get(name, []), *values})

    def record(self) -> None:
        """Look over the shoulder of the network's own methods, behind all hooks of FSDP."""
        network, block = LongLiveTransformer3DModel, LongLiveTransformerBlock
        embed_time, rotate_clip, create_kv_cache = network._embed_time, network._rotate_clip, network.create_kv_cache
        block_forward, set_gradient_sync = block.forward, FSDPModule.set_requires_gradient_sync

        def noting_embed_time(model, timestep, dtype):
            self.note_dtype("timestep", timestep.dtype)
            if torch.is_grad_enabled():  # validation has times of its own
                self.note_values("timestep", timestep.flatten().tolist())
            return embed_time(model, timestep, dtype)

        def noting_rotate_clip(model, positions, *arguments):
            self.note_values("position", positions.flatten().tolist())
            return rotate_clip(model, positions, *arguments)

        def noting_block(model, hidden_states, text, temb, rotary_emb, *arguments):
            self.note_dtype("tokens", hidden_states.dtype)
            self.note_dtype("rotation", rotary_emb.dtype)
            return block_forward(model, hidden_states, text, temb, rotary_emb, *arguments)

        def noting_create_kv_cache(model, *arguments, dtype=None, **options):
            if options.get("device") != "meta":  # on which memory is counted beforehand
                self.note_dtype("KV cache", dtype)
            return create_kv_cache(model, *arguments, dtype=dtype, **options)

        def noting_gradient_sync(model, requires_gradient_sync, **options):
            self.note_values("gradient sync", [float(requires_gradient_sync)])
            return set_gradient_sync(model, requires_gradient_sync, **options)

        network._embed_time, network._rotate_clip = noting_embed_time, noting_rotate_clip
        network.create_kv_cache, block.forward = noting_create_kv_cache, noting_block
        FSDPModule.set_requires_gradient_sync = noting_gradient_sync


def train(run: Run, rank: int, port: int) -> None:
    """One rank of a run."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(run.ranks),
        "LOCAL_WORLD_SIZE": str(run.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_MIXED_PRECISION": run.mixed_precision,
    }
    arrivals = Arrivals()
    if run.arrivals is not None:
        arrivals.record()

    def accelerator_with_fsdp2(**options) -> Accelerator:
        accelerator = Accelerator(**options)
        if run.ranks > 1:
            use_fsdp2(accelerator, cp_size=run.cp_size)
        return accelerator

    script, parse = SCRIPTS[run.script]
    processes.Accelerator = accelerator_with_fsdp2
    script.main(parse(run.words))
    if run.arrivals is not None:
        Path(f"{run.arrivals}-{rank}.json").write_text(json.dumps(vars(arrivals)))


def start(run: Run) -> list[multiprocessing.Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=train, args=(run, rank, port)) for rank in range(run.ranks)]
    for rank in ranks:
        rank.start()
    return ranks


def finish(run: Run, ranks: list[multiprocessing.Process]) -> None:
    """Wait for all ranks; those that are left when one has failed or the run is to be killed, are killed."""
    while any(rank.is_alive() for rank in ranks):
        failed = any(rank.exitcode for rank in ranks)
        if failed or (run.kill_after is not None and last_step(run.log) >= run.kill_after):
            for rank in ranks:
                rank.kill()
        time.sleep(0.01)
    expected = 0 if run.kill_after is None else -signal.SIGKILL
    codes = [rank.exitcode for rank in ranks]
    if codes != [expected] * run.ranks:
        raise SystemExit(f"The ranks of {run} ended with {codes} instead of {expected}")


def last_step(log: Path) -> int:
    entries = read_log(log) if log.exists() else []
    return int(entries[-1]["step"]) if entries else 0


def main(runs: Path) -> None:
    for run in (Run(**settings) for settings in json.loads(runs.read_text())):
        began = time.monotonic()
        finish(run, start(run))
        print(f"{run.ranks} ranks, {run.mixed_precision}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
