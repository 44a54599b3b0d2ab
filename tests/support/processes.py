"""Processes that run this checkout's package, with one thread each; also several, as torchrun would start them.

They are forked from one that has imported everything, see `fork_server.py`: only a test of what starting takes, as of
launchers and console scripts, needs to start Python.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.support.paths import IMPORTED_BY_SCRIPTS, PROGRAMS, ROOT


# `huggingface_hub` reads its endpoint and its cache folder from the environment when it is imported, and copies them
# about. So they are the same in all processes: an address that no name server knows, for which HTTP_PROXY of a process
# says who answers, and a folder of the process' own working directory.
HUB_CACHE = "huggingface"
HUB_VARIABLES = {
    "HF_ENDPOINT": "http://hub.invalid",
    "HF_HOME": HUB_CACHE,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def environment(**others: object) -> dict[str, str]:
    """The variables of a process: those of this one, but for where the package is and the number of threads."""
    own = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, **others}
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def hub_environment(**others: object) -> dict[str, str]:
    """The same, but with nothing left of what a user may have set for the Hub."""
    variables = environment(**others).items()
    kept = {name: value for name, value in variables if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {**kept, **HUB_VARIABLES}


def forking_launcher(num_ranks: int) -> list[str]:
    """The words in the place of `-m`, before a launcher's module, with which the ranks that it starts are forked."""
    return [str(PROGRAMS / "forked_ranks.py"), str(num_ranks)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ForkServer:
    """The process that others are forked from."""

    def __init__(self, interpret: str | None):
        paths = os.pathsep.join([str(ROOT), *(str(ROOT / path) for path in IMPORTED_BY_SCRIPTS)])
        # So that looking for GPUs does not begin to use them: what is forked afterwards could not any more.
        variables = hub_environment(PYTHONPATH=paths, PYTORCH_NVML_BASED_CUDA_CHECK=1)
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

    def ask(self, request: str, what: object) -> int | None:
        """Send a request, wait for the answer."""
        with self._lock:
            print(json.dumps([request, what]), file=self._process.stdin, flush=True)
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
        words: What would follow `python` on a command line: a file, `-c CODE` or `-m MODULE`, and arguments.
        variables: Its environment.
        folder: Where it runs.
        typed: What it reads, as through a pipe.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        variables: Mapping[str, str],
        folder: Path = ROOT,
        typed: str | None = None,
    ):
        self._output = tempfile.TemporaryDirectory()
        self._stdout, self._stderr = (Path(self._output.name, name) for name in ("stdout", "stderr"))
        self._stdout.touch()
        self._stderr.touch()
        self._server = fork_server(variables.get("TRITON_INTERPRET"))
        self._status: int | None = None
        program = {"words": [str(word) for word in words], "environment": dict(variables), "folder": str(folder)}
        stdin = Path(os.devnull)
        if typed is not None:
            stdin = Path(self._output.name, "stdin")
            os.mkfifo(stdin)
        files = {"stdin": str(stdin), "stdout": str(self._stdout), "stderr": str(self._stderr)}
        self.pid = self._server.ask("start", program | files)
        if typed is not None:
            stdin.write_text(typed)

    @property
    def printed(self) -> str:
        return self._stdout.read_text()

    @property
    def errors(self) -> str:
        return self._stderr.read_text()

    def lines(self) -> Iterator[str]:
        """What it prints, line by line, as it comes, until it ends."""
        begun = ""
        with self._stdout.open() as file:
            while True:
                has_ended = self.poll() is not None  # before what it printed until then is read
                *lines, begun = (begun + file.read()).split("\n")
                yield from lines
                if has_ended:
                    return
                time.sleep(0.01)

    def poll(self) -> int | None:
        """The exit status, as of `subprocess.Popen`."""
        if self._status is None:
            self._status = self._server.ask("poll", self.pid)
        return self._status

    def wait(self, timeout: float = 300) -> int:
        """The exit status at the end. After so many seconds, it is killed."""
        return _wait_for(self, timeout)

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.poll() is None:
            self._status = self._server.ask("kill", self.pid)


@dataclass(frozen=True)
class ForkedRun:
    """The processes of a program.

    Args:
        ranks: The processes.
    """

    ranks: list[ForkedProcess]

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
        return _wait_for(self, timeout)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()


def _wait_for(running: ForkedProcess | ForkedRun, timeout: float) -> int:
    began = time.monotonic()
    try:
        while (code := running.poll()) is None:
            waited = time.monotonic() - began
            assert waited < timeout, running.errors
            time.sleep(min(0.01 + waited / 50, 0.1))  # each time costs both sides some time
    finally:
        running.kill()
    return code


def start(words: Sequence[str | Path], variables: Mapping[str, str], num_ranks: int = 1) -> ForkedRun:
    """
    Start a program.

    Args:
        words: Its file and its command line.
        variables: The environment of every process.
        num_ranks: The number of processes; several have those variables as well that `torchrun` would give them.
    """
    shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(num_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared if num_ranks > 1 else {}
        ranks.append(ForkedProcess(words, {**variables, **own}))
    return ForkedRun(ranks)


def run_program(program: ModuleType, *arguments: str | Path, **others: object) -> str:
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
    process = ForkedProcess([program.__file__, *arguments], environment(**others))
    status = process.wait(900)
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
    run = start([program, *arguments], environment(**others), num_ranks)
    run.wait(timeout)
    return [(rank.poll(), rank.printed + rank.errors) for rank in run.ranks]
