"""A process that has imported what the programs of the tests import, which takes seconds, and forks others.

    python -m tests.support.fork_server

It reads requests, a line of JSON each, and answers each with a line: `start` with the number of a new process that
runs a program, `poll` with the exit status of a process, or null while it runs, and `kill` with the exit status after
it. What still runs when there are no more requests is killed. `processes.py` is what asks.
"""

import gc
import json
import os
import runpy
import signal
import sys
import traceback
from typing import NoReturn, TextIO

import accelerate  # noqa: F401
import peft  # noqa: F401
import torch
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.multiprocessing

import train_ar  # noqa: F401
import train_dmd  # noqa: F401
from tests.support import fsdp2_on_cpu, golden_models, group_mean, tiny_decoder, tiny_vae  # noqa: F401


def be_program(
    program: str, words: list[str], environment: dict[str, str], folder: str, stdout: str, stderr: str
) -> NoReturn:
    """
    Become a process of a program.

    Args:
        program: Its file.
        words: Its command line.
        environment: All its variables; those that libraries read when they are imported have to be the server's.
        folder: Where it runs.
        stdout: The file that takes what it prints.
        stderr: The file that takes its errors.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, flags, number in ((os.devnull, os.O_RDONLY, 0), (stdout, os.O_WRONLY, 1), (stderr, os.O_WRONLY, 2)):
        file = os.open(path, flags | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [program, *words]
    status = 1
    try:
        runpy.run_path(program, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Server:
    """The processes that were started and have not ended yet, as far as is known."""

    def __init__(self, answers: TextIO):
        self.answers = answers
        self.running: set[int] = set()

    def start(self, **program) -> int:
        process = os.fork()
        if process == 0:
            self.answers.close()
            be_program(**program)
        self.running.add(process)
        return process

    def poll(self, process: int, options: int = os.WNOHANG) -> int | None:
        ended, status = os.waitpid(process, options)
        if not ended:
            return None
        self.running.remove(process)
        return os.waitstatus_to_exitcode(status)

    def kill(self, process: int) -> int | None:
        os.kill(process, signal.SIGKILL)
        return self.poll(process, 0)

    def serve(self) -> None:
        for line in sys.stdin:
            request, arguments = json.loads(line)
            answer = {"start": self.start, "poll": self.poll, "kill": self.kill}[request](**arguments)
            print(json.dumps(answer), file=self.answers, flush=True)
        for process in list(self.running):
            self.kill(process)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # so that no collection in a process touches, thus copies, the memory that all share
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as own:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for what others print
        Server(own).serve()
