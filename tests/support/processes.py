"""Run a program in several processes, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


def run_ranks(program: Path, num_ranks: int, *arguments: str | Path, timeout: float = 600) -> list[tuple[int, str]]:
    """
    Start `program` once for each rank, with one thread each, and wait for all.

    Returns:
        For each rank, its exit status and all that it printed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in settings.items()}},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for settings in ({**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(num_ranks))
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]
