"""Processes that run this checkout's package, with one thread each; also several, as torchrun would start them.

They are forked from one that has imported everything, see `fork_server.py`: only a test of what starting takes, as of
signals and console scripts, needs to start Python.
"""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.support.paths import IMPORTED_BY_SCRIPTS, ROOT


def environment(**others: object) -> dict[str, str]:
    """The variables of a process: those of this one, but for where the package is and the number of threads."""
    own = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, **others}
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ForkServer:
    """The process that others are forked from."""

    def __init__(self, interpret: str | None):
        paths = os.pathsep.join([str(ROOT), *(str(ROOT / path) for path in IMPORTED_BY_SCRIPTS)])
        variables = environment(PYTHONPATH=paths, HF_HUB_OFFLINE=1)
        variables.pop("TRITON_INTERPRET", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server"],
            env=variables if interpret is None else variables | {"TRITON_INTERPRET": interpret},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()
        atexit.register(self._close)

    def ask(self, request: str, **arguments: object) -> int | None:
        """Send a request, wait for the answer."""
        with self._lock:
            print(json.dumps([request, arguments]), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())

    def _close(self) -> None:
        self._process.communicate()


@functools.cache
def fork_server(interpret: str | None) -> ForkServer:
    """
    The server of this process. It is started when the first asks for it.

    Args:
        interpret: TRITON_INTERPRET, which Triton reads when it is imported, and torch and diffusers import it.
    """
    return ForkServer(interpret)


class ForkedProcess:
    """A process of a program.

    Args:
        program: The file of the program, which is run as `__main__`.
        words: Its command line.
        variables: Its environment.
        folder: Where it writes the files that take its output.
    """

    def __init__(self, program: Path, words: Sequence[str], variables: Mapping[str, str], folder: Path):
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        self._server = fork_server(variables.get("TRITON_INTERPRET"))
        self._status: int | None = None
        self._number = self._server.ask(
            "start",
            program=str(program),
            words=list(words),
            environment=dict(variables),
            folder=str(ROOT),
            stdout=str(self._stdout),
            stderr=str(self._stderr),
        )

    @property
    def printed(self) -> str:
        return self._stdout.read_text()

    @property
    def errors(self) -> str:
        return self._stderr.read_text()

    def poll(self) -> int | None:
        """The exit status, as of `subprocess.Popen`."""
        if self._status is None:
            self._status = self._server.ask("poll", process=self._number)
        return self._status

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.poll() is None:
            self._status = self._server.ask("kill", process=self._number)


@dataclass(frozen=True)
class ForkedRun:
    """The processes of a program.

    Args:
        ranks: The processes.
        folder: The files that take their output.
    """

    ranks: list[ForkedProcess]
    folder: tempfile.TemporaryDirectory

    @property
    def errors(self) -> str:
        """What the ranks wrote to standard error."""
        return "\n".join(rank.errors for rank in self.ranks)

    def poll(self) -> int | None:
        """The exit status, as of `subprocess.Popen`; that of the first rank that failed, if one did."""
        codes = [rank.poll() for rank in self.ranks]
        return next(filter(None, codes), None if None in codes else 0)

    def wait(self, timeout: float = 600) -> int:
        """The exit status at the end. Ranks that are left when another has failed, or after so many seconds, are
        killed."""
        deadline = time.monotonic() + timeout
        try:
            while (code := self.poll()) is None:
                assert time.monotonic() < deadline, self.errors
                time.sleep(0.01)
        finally:
            self.kill()
        return code

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()


def start(program: Path, words: Sequence[str], variables: Mapping[str, str], num_ranks: int = 1) -> ForkedRun:
    """
    Start a program.

    Args:
        program: Its file.
        words: Its command line.
        variables: The environment of every process.
        num_ranks: The number of processes; several have those variables as well that `torchrun` would give them.
    """
    run = ForkedRun([], tempfile.TemporaryDirectory())
    shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(num_ranks):
        folder = Path(run.folder.name, str(rank))
        folder.mkdir()
        ranks_own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared if num_ranks > 1 else {}
        run.ranks.append(ForkedProcess(program, words, {**variables, **ranks_own}, folder))
    return run


def run_program(program: ModuleType | Path, *arguments: str | Path, **others: object) -> str:
    """
    Run a program of `tests.programs` in a process of its own, as what decides when Triton is imported whether it
    interprets needs it.

    Args:
        program: The module, or its file.
        *arguments: Its arguments.
        **others: Variables of its environment.

    Returns:
        What it prints.
    """
    path = program if isinstance(program, Path) else Path(program.__file__)
    run = start(path, [str(argument) for argument in arguments], environment(**others))
    status = run.wait(900)
    (process,) = run.ranks
    assert status == 0, process.printed + process.errors[-8000:]
    return process.printed


def run_ranks(
    program: Path, num_ranks: int, *arguments: str | Path, timeout: float = 600, **others: object
) -> list[tuple[int | None, str]]:
    """
    Start `program` once for each rank, with one thread each, and wait for all.

    Args:
        program: The file of the program.
        num_ranks: The number of processes.
        *arguments: Its arguments.
        timeout: Seconds after which all are killed.
        **others: Variables of its environment.

    Returns:
        For each rank, its exit status and all that it printed. Those that are left when one has failed are killed.
    """
    run = start(program, [str(argument) for argument in arguments], environment(**others), num_ranks)
    run.wait(timeout)
    return [(rank.poll(), rank.printed + rank.errors) for rank in run.ranks]
