"""A process that has imported what processes of the tests import, which takes seconds, and forks them.

    python -m tests.support.fork_server

It reads requests, a line of JSON each, and answers each with a line: `start` with the number of a new process that
runs what `python WORDS` would, `poll` with the exit status of a process, or null while it runs, and `kill` with the
exit status after it. What still runs when there are no more requests is killed. `processes.py` is what asks.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

import huggingface_hub
import torch


IMPORTED = (
    "accelerate",
    "longlive_diffusers.cli.run_generate",
    "longlive_diffusers.cli.run_serve",
    "peft",
    "tests.support.fsdp2_on_cpu",
    "tests.support.golden_models",
    "tests.support.group_mean",
    "tests.support.live_server",
    "tests.support.tiny_decoder",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.device_mesh",
    "torch.distributed.elastic.multiprocessing",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "torch.distributed.run",
    "torch.distributed.tensor.experimental",
    "train_ar",
    "train_dmd",
)


def be_program(
    words: list[str], environment: dict[str, str], folder: str, stdin: str, stdout: str, stderr: str
) -> None:
    """
    Run a program in this process, as if it had been started.

    Args:
        words: What would follow `python` on a command line: a file, `-c CODE` or `-m MODULE`, and arguments.
        environment: All its variables; those that libraries read when they are imported have to be the server's.
        folder: Where it runs.
        stdin: The file that it reads from.
        stdout: The file that takes what it prints.
        stderr: The file that takes its errors.
    """
    os.setsid()  # Ctrl-C is for who asked, which ends the server, which kills this
    signal.signal(signal.SIGINT, signal.default_int_handler)
    take_environment(environment)
    os.chdir(folder)
    for path, flags, number in ((stdin, os.O_RDONLY, 0), (stdout, os.O_WRONLY, 1), (stderr, os.O_WRONLY, 2)):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)  # the server's holds what was read ahead
    run_words(words)


def renew_thread_pool() -> None:
    """In a process that was forked: have torch make its pool of threads anew here, in the only thread that there is.
    The first operation does so otherwise, and where two threads come to it at once, as when transformers loads
    weights, one of them may find none ("Invalid thread pool!")."""
    torch.set_num_threads(torch.get_num_threads())


def take_environment(variables: Mapping[str, str]) -> None:
    """Have these variables and no others, as a process that is started has those that it is given."""
    os.environ.clear()
    os.environ.update(variables)
    huggingface_hub.constants.HF_HUB_OFFLINE = variables.get("HF_HUB_OFFLINE") == "1"  # read when it was imported


def run_words(words: list[str]) -> None:
    """Run what `python WORDS` would, in this process."""
    match words:
        case ["-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *_]:
            sys.argv = words[1:]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [program, *_]:
            sys.argv = words
            runpy.run_path(program, run_name="__main__")


def serve(answers: TextIO) -> Callable[[], None] | None:
    """Answer until there are no more requests; in each process that is forked, return what it has to run."""
    running: set[int] = set()

    def status_of(process: int, options: int) -> int | None:
        ended, status = os.waitpid(process, options)
        if not ended:
            return None
        running.remove(process)
        return os.waitstatus_to_exitcode(status)

    for line in sys.stdin:
        request, asked = json.loads(line)
        if request == "start":
            answer = os.fork()
            if answer == 0:
                answers.close()
                return functools.partial(be_program, **asked)
            running.add(answer)
        elif request == "poll":
            answer = status_of(asked, os.WNOHANG)
        else:
            os.kill(asked, signal.SIGKILL)
            answer = status_of(asked, 0)
        print(json.dumps(answer), file=answers, flush=True)
    for process in list(running):
        os.kill(process, signal.SIGKILL)
        status_of(process, 0)
    return None


class End:
    """What ends a process at once, when all is done that is to be done at exit: taking apart hundreds of thousands of
    objects one by one, as Python would, copies the memory that processes share, and takes half a second."""

    def __init__(self) -> None:
        self.status: int | None = None  # None: as Python ends, as after Ctrl-C, which is an end by that signal

    def run(self, program: Callable[[], None]) -> None:
        """Run the last thing that this process runs."""
        self.status = 0
        try:
            program()
        except SystemExit as error:
            self.status = error.code if isinstance(error.code, int) else int(error.code is not None)
            raise
        except BaseException as error:
            self.status = None if isinstance(error, KeyboardInterrupt) else 1
            raise

    def __call__(self) -> None:
        if self.status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)


if __name__ == "__main__":
    end = End()
    atexit.register(end)  # the first to be registered is the last to be called
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for what others print
    gc.disable()  # nothing of what is imported is garbage
    for name in IMPORTED:
        importlib.import_module(name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("tests.support.quick_interpreter").quicken_interpreter()
    sys.stdout.flush()  # or each process would print it again
    gc.collect()
    gc.freeze()  # so that no collection in a process touches, thus copies, the memory that all share
    gc.enable()
    os.register_at_fork(after_in_child=renew_thread_pool)  # also in what those fork in their turn
    # From here, so that a program ends as Python ends: with a traceback, what is to be done at exit, and its status.
    if program := serve(answers):
        end.run(program)
