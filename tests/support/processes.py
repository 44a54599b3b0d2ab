"""Processes that run this checkout's package, with one thread each; also several, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from tests.support.paths import ROOT


def environment(**others: object) -> dict[str, str]:
    """The variables of a process: those of this one, but for where the package is and the number of threads."""
    own = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, **others}
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def run_program(program: ModuleType, *arguments: str, **others: object) -> str:
    """
    Run a program of `tests.programs` in a process of its own, as what decides when Triton is imported whether it
    interprets needs it.

    Args:
        program: The module.
        *arguments: Its arguments.
        **others: Variables of its environment.

    Returns:
        What it prints.
    """
    run = subprocess.run(
        [sys.executable, "-m", program.__name__, *arguments],
        env=environment(**others),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    return run.stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(program: Path, num_ranks: int, *arguments: str | Path, timeout: float = 600) -> list[tuple[int, str]]:
    """
    Start `program` once for each rank, with one thread each, and wait for all.

    Returns:
        For each rank, its exit status and all that it printed.
    """
    shared = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), *map(str, arguments)],
            env=environment(RANK=rank, LOCAL_RANK=rank, **shared),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]
