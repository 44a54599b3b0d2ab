"""Runs of the training scripts whose processes are forked from one that has imported them, which takes seconds.

What runs is the script's `run`, with a command line, standard error and an exit status of its own. Every rank has the
variables that `accelerate launch` would give it.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import train_ar
import train_dmd
from tests.support.processes import free_port


SCRIPTS = {"train_ar.py": train_ar, "train_dmd.py": train_dmd}


def _run(script: str, words: list[str], environment: Mapping[str, str], errors: Path) -> None:
    """Become a process of the script."""
    os.environ.clear()  # what was forked has the variables of an earlier run
    os.environ.update(environment)
    with errors.open("wb") as file, open(os.devnull, "wb") as nowhere:
        os.dup2(file.fileno(), sys.stderr.fileno())
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    sys.argv = [script, *words]
    raise SystemExit(SCRIPTS[script].run(words))


@dataclass(frozen=True)
class ForkedRun:
    """A run of a script.

    Args:
        ranks: Its processes.
        folder: Where each writes what goes to standard error.
    """

    ranks: list[multiprocessing.Process]
    folder: tempfile.TemporaryDirectory

    @property
    def errors(self) -> str:
        """What the ranks wrote to standard error."""
        return "\n".join(path.read_text() for path in sorted(Path(self.folder.name).iterdir()))

    def poll(self) -> int | None:
        """The exit status, as of `subprocess.Popen`; that of the first rank that failed, if one did."""
        codes = [rank.exitcode for rank in self.ranks]
        return next(filter(None, codes), None if None in codes else 0)

    def wait(self, timeout: float = 600) -> int:
        """The exit status at the end. Ranks that are left when another has failed are killed."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.005)
        self.kill()
        return code

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()


def start_script(script: str, words: list[str], environment: Mapping[str, str], num_processes: int = 1) -> ForkedRun:
    """
    Args:
        script: The file name of the script.
        words: Its command line.
        environment: The variables of every rank. The process that ranks are forked from is started with those of the
            first run: what libraries read when they are imported is the same in all runs.
        num_processes: The number of ranks.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    shared = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = ForkedRun([], tempfile.TemporaryDirectory())
    imported_from = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for rank in range(num_processes):
        ranks_own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared if num_processes > 1 else {}
        arguments = (script, words, {**environment, **ranks_own}, Path(run.folder.name, f"rank-{rank}"))
        run.ranks.append(context.Process(target=_run, args=arguments))
        with mock.patch.dict(os.environ, {**environment, **imported_from}):
            run.ranks[-1].start()
    return run
