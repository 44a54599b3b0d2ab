"""Programs in processes forked from one that has imported the package, which takes seconds, and a client of these.

`huggingface_hub` reads its endpoint and cache folder from the environment when it is imported, and copies them about.
So these are the same in all programs: an address that no name server knows, for which the variable HTTP_PROXY of each
says who answers, and a folder of each program's own working directory.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.support.paths import ROOT


HUB_CACHE = "huggingface"  # in the working directory
ENVIRONMENT = {
    "HF_ENDPOINT": "http://hub.invalid",
    "HF_HOME": HUB_CACHE,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
}
IMPORTED = (
    "accelerate",
    "longlive_diffusers.cli.run_generate",
    "tests.support.live_server",
    "tests.support.tiny_pipeline",
)


def environment(**others: str) -> dict[str, str]:
    """The variables of a program."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [own.get("PYTHONPATH")])])
    return {**own, **ENVIRONMENT, "PYTHONPATH": path, **others}


class ForkedProgram:
    """
    A program that runs, with as much of the interface of `subprocess.Popen` as tests need.

    Args:
        words: What would follow `python` on a command line: `-c CODE` or `-m MODULE`, and arguments.
        variables: Its environment, as of `environment`.
        folder: Its working directory.
    """

    def __init__(
        self,
        words: Sequence[str],
        variables: Mapping[str, str] | None = None,
        folder: Path = ROOT,
    ) -> None:
        self.returncode: int | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this lives
        out, its_out = os.pipe()
        self._told, its_told = os.pipe()
        self.stdout = os.fdopen(out)
        self._buffered = b""
        variables = environment() if variables is None else dict(variables)
        request = {"words": list(words), "environment": variables, "folder": str(folder)}
        with open(os.devnull, "rb") as nothing:
            files = [nothing.fileno(), its_out, self._errors.fileno(), its_told]
            socket.send_fds(_server(), [json.dumps(request).encode() + b"\n"], files)
            self.pid = int(self._told_line(60))
        os.close(its_out)
        os.close(its_told)

    def _told_line(self, timeout: float) -> bytes:
        """The next line of what is told about the program: its process, and its status when it has ended."""
        while b"\n" not in self._buffered:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            self._buffered += os.read(self._told, 100)
        line, self._buffered = self._buffered.split(b"\n", 1)
        return line

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        if self.returncode is None:
            self.returncode = int(self._told_line(timeout))
            os.close(self._told)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end; what it printed that was not read yet, and all its errors."""
        ended, deadline = b"", time.monotonic() + timeout
        while part := self._printed_by(deadline):
            ended += part
        self.wait(max(0, deadline - time.monotonic()))
        self._errors.seek(0)
        return ended.decode(), self._errors.read().decode()

    def _printed_by(self, deadline: float) -> bytes:
        """What it prints next; nothing at the end."""
        if not select.select([self.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
            raise subprocess.TimeoutExpired("a forked program", deadline)
        return os.read(self.stdout.fileno(), 1 << 16)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> socket.socket:
    """Start the process that has imported, once in each process that runs tests; it ends with that."""
    ours, its = socket.socketpair()
    subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import next_program; next_program({its.fileno()})()"],
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        pass_fds=[its.fileno()],
    )
    its.close()
    return ours


# -- in the process that has imported ------------------------------------------------------------------------------


def next_program(connection: int) -> Callable[[], None]:
    """Import, fork a process for each program that is asked for, and return in that what runs it."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each program would copy the pages of all that was imported
    gc.set_threshold(100_000)  # what else they import would be looked through for garbage again and again
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asked, which ends this process as well
    asked = socket.socket(fileno=connection)
    watchers: set[int] = set()
    while True:
        data, files, _, _ = socket.recv_fds(asked, 1 << 16, 4)
        if not data:
            for watcher in watchers:
                os.waitpid(watcher, 0)
            os._exit(0)
        while not data.endswith(b"\n"):
            data += asked.recv(1 << 16)
        if not (watcher := os.fork()):
            asked.close()
            return _watched(json.loads(data), files)
        watchers.add(watcher)
        watchers -= {watcher for watcher in watchers if os.waitpid(watcher, os.WNOHANG)[0]}
        for file in files:
            os.close(file)


def _watched(request: dict, files: list[int]) -> Callable[[], None]:
    """Fork the program, and tell how it goes on."""
    *standard, told = files
    if program := os.fork():
        for file in standard:
            os.close(file)
        os.write(told, b"%d\n" % program)
        status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        os.write(told, b"%d\n" % status)
        os._exit(0)
    for number, file in enumerate(standard):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    os.chdir(request["folder"])
    return functools.partial(_become, request["words"], request["environment"])


def _become(words: list[str], variables: Mapping[str, str]) -> None:
    """Run what `python WORDS` runs."""
    os.environ.clear()
    os.environ.update(variables)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    kind, program, *arguments = words
    sys.argv = [kind, *arguments]
    if kind == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
