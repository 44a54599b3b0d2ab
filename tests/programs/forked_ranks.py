"""Runs a launcher, as `python -m` would, and forks the ranks that it starts:

    python forked_ranks.py NUM_RANKS MODULE ARGUMENTS

Each is a process of the launcher's own, with the command line and the environment that the launcher has chosen. Only
the seconds that Python takes to start and to import are gone: the ranks come from this process, which is itself forked
from one that has imported everything. They are forked before the launcher has threads, which a fork would leave behind
with whatever locks they hold, and then wait until they are told what to run.
"""

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.support.fork_server import run_words, take_environment


class ForkedRank:
    """A process that waits for what to run; for the launcher, a `subprocess.Popen`."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._writer)
            self._run(reader)
        os.close(reader)

    def _run(self, reader: int) -> None:
        with os.fdopen(reader) as file:
            told = file.readline()  # an end would not come: the ranks that are forked later have the pipe too
        if not told:  # the launcher has ended
            os._exit(0)
        words, variables = json.loads(told)
        os.setsid()
        take_environment(variables)
        run_words(words)
        sys.exit()

    def start(self, args: Sequence[str], env: Mapping[str, str]) -> None:
        words = [word for word in args[1:] if word != "-u"]
        with os.fdopen(self._writer, "w") as file:
            print(json.dumps([words, dict(env)]), file=file)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return status


def main(num_ranks: int, module: str) -> None:
    """Run the launcher."""
    ranks = iter([ForkedRank() for _ in range(num_ranks)])

    def start(args: Sequence[str], env: Mapping[str, str], stdout: None, stderr: None, **options: bool) -> ForkedRank:
        assert stdout is stderr is None and options == {"start_new_session": True}, "what ForkedRank does"
        rank = next(ranks)
        rank.start(args, env)
        return rank

    subprocess_handler.Popen = start
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _, num_ranks, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    main(int(num_ranks), module)
