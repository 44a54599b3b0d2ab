"""What becomes of ranks that share a stream when one fails, ends early, or does something else than the others.

    python tests/programs/failing_ranks.py RESULTS.json [CASE ...]

Every case has processes and a process group of its own. They are forked from this one, which has imported everything
and made the pipeline. What is written is, for each case and rank: the exit status, what it said, the error that it
ended with and how many seconds it took from the beginning of the case.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from longlive_diffusers import LongLivePipeline, StreamingSession
from tests.support.processes import free_port
from tests.support.tiny_decoder import small_decoder
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline, tiny_transformer


LIMIT = 30.0  # seconds, after which a rank is said to hang


class Ranks:
    """A rank in a case: its pipeline, its place, and what it says."""

    def __init__(self, pipe: LongLivePipeline, rank: int):
        self.pipe, self.rank, self.said = pipe, rank, []

    def say(self, what: Any) -> None:
        self.said.append(what)

    def stream(self, **arguments) -> StreamingSession:
        return self.pipe.stream(**tiny_arguments(**{"num_frames": None, "num_inference_steps": 2, **arguments}))

    def count(self, session: StreamingSession) -> int:
        return sum(1 for _ in session)

    def call(self, **arguments) -> None:
        """Make a short video, and say what it is, or what error it ends with."""
        self.say(round(float(self.pipe(**tiny_arguments(**arguments)).frames.double().sum()), 4))

    def try_to(self, call: Callable[[], Any]) -> None:
        """Say what error `call` ends with."""
        try:
            call()
            self.say("no error")
        except (ValueError, RuntimeError, LookupError) as error:
            self.say(f"{type(error).__name__}: {error}")


Case = Callable[[Ranks], None]


# -- failures -----------------------------------------------------------------------------------------------------


def in_callback(ranks: Ranks, act: Callable[[], Any], *, of_rank: int, at_step: int = 3, **arguments) -> None:
    """A rank acts in mid-chunk, after a step of the second chunk."""

    def callback(pipe, step, timestep, tensors):
        if ranks.rank == of_rank and step == at_step - 1:
            act()
        return {}

    with ranks.stream(callback_on_step_end=callback, **arguments) as session:
        for chunk in session:
            ranks.say(chunk.index)


def reads_a_file_of_no_text(ranks: Ranks) -> None:
    """An error whose text cannot be sent as it is: names of files are bytes."""

    def callback(pipe, step, timestep, tensors):
        if ranks.rank == 1:
            raise OSError("cannot read 'im\udce4ge.png'")
        return {}

    ranks.call(callback_on_step_end=callback)


def unasked(ranks: Ranks, *, of_rank: int) -> None:
    """A rank fails in the thread that makes the second chunk, while rank 0 is busy with the first; then it leaves."""

    def callback(pipe, step, timestep, tensors):
        return fail() if ranks.rank == of_rank and step == 2 else {}

    with ranks.stream(callback_on_step_end=callback, async_decode=True, output_type="pt") as session:
        for chunk in session:
            ranks.say(chunk.index)
            if ranks.rank == 0:
                time.sleep(1)
                break


def in_body(ranks: Ranks, act: Callable[[], Any], *, of_rank: int, **arguments) -> None:
    """A rank acts after the second chunk."""
    with ranks.stream(**arguments) as session:
        for chunk in session:
            ranks.say(chunk.index)
            if ranks.rank == of_rank and chunk.index == 1:
                act()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> NoReturn:
    raise LookupError("a bug of the user's")


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def runs_out_of_memory(*args, **kwargs) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def encodes_an_image_without_memory(ranks: Ranks) -> None:
    if ranks.rank == 1:
        ranks.pipe.vae.encoder.forward = runs_out_of_memory
    ranks.call(image=torch.zeros(3, 64, 64))


# -- early ends ---------------------------------------------------------------------------------------------------

ENDS = ("break", "close", "thread", "callback", "interrupt", "drop", "exception")


def end_early(ranks: Ranks, how: str, **arguments) -> None:
    """Rank 0 ends an endless stream in its second chunk or after it, the others ask for chunks while there are any."""
    leads, closers, opened = ranks.rank == 0, [], []

    def callback(pipe, step, timestep, tensors):
        if leads and how == "callback" and step == 2:
            opened[0].close()
        return {}

    with contextlib.ExitStack() as stack:
        session = ranks.stream(callback_on_step_end=callback if how == "callback" else None, **arguments)
        if how == "callback":
            opened.append(session)
        if how != "drop":
            stack.enter_context(session)
        for chunk in session:
            if not leads or chunk.index < 1 or how == "callback":
                continue
            if how in ("break", "drop"):
                break
            if how == "exception":
                stack.enter_context(contextlib.suppress(KeyboardInterrupt))
                raise KeyboardInterrupt
            if how == "close":
                session.close()
            elif how == "interrupt":
                session.interrupt()
            elif not closers:
                closers.append(threading.Thread(target=session.close))
                closers[0].start()
    for closer in closers:
        closer.join()
    del session
    gc.collect()


def ends_early(ranks: Ranks, ends: list[tuple[str, bool]]) -> None:
    """Streams that end early, one after the other; nothing that was said on one reaches the next."""
    for number, (how, is_asynchronous) in enumerate(ends):
        end_early(ranks, how, async_decode=is_asynchronous, output_type=["latent", "pt"][number % 2])
        ranks.say(how)
    ranks.call()


def another_rank_ends_early(ranks: Ranks, how: str, **arguments) -> None:
    """Another rank than the first leaves the loop; it works on unseen, until the first has its video."""
    with ranks.stream(num_frames=29, **arguments) as session:
        for chunk in session:
            ranks.say(chunk.index)
            if ranks.rank == 1 and chunk.index == 0:
                if how == "close":
                    session.close()
                elif how == "KeyboardInterrupt":
                    with contextlib.suppress(KeyboardInterrupt), session:
                        raise KeyboardInterrupt
                else:
                    break
    ranks.call()


# -- requests that are refused ------------------------------------------------------------------------------------


def refused(ranks: Ranks, *, of_rank: int, **arguments) -> None:
    """A rank asks for what cannot be, or for something else than the others; then all ask for what can be."""
    ranks.try_to(partial(ranks.call, **(arguments if ranks.rank == of_rank else {})))
    ranks.call()


def text_encoder_fails(ranks: Ranks, encode: Callable) -> None:
    encoder = ranks.pipe.text_encoder
    if ranks.rank == 0:
        encoder.forward = encode
    ranks.try_to(ranks.call)
    if ranks.rank == 0:
        del encoder.forward
    ranks.call()


def text_encoder_fails_later(ranks: Ranks) -> None:
    with ranks.stream() as session:
        for chunk in session:
            ranks.say(chunk.index)
            if ranks.rank == 0:
                ranks.pipe.text_encoder.forward = runs_out_of_memory
                session.prompt = "a dog"


# -- several sessions ---------------------------------------------------------------------------------------------


def two_sessions_in_turn(ranks: Ranks) -> None:
    first, second = ranks.stream(num_frames=29), ranks.stream(num_frames=29, prompt="a dog")
    for pair in zip(first, second, strict=True):
        ranks.say([round(float(chunk.latents.double().sum()), 4) for chunk in pair])


def sessions_in_another_order(ranks: Ranks) -> None:
    first, second = ranks.stream(num_frames=29), ranks.stream(num_frames=29)
    for session in (first, second) if ranks.rank == 0 else (second, first):
        ranks.say(next(session).index)


def another_video_meanwhile(ranks: Ranks) -> None:
    """Rank 0 keeps a session open and makes another video, the others ask for the next chunk."""
    session = ranks.stream(num_frames=29)
    next(session)
    if ranks.rank == 0:
        ranks.call()
    else:
        next(session)


def an_asynchronous_one_beside(ranks: Ranks, first: bool, second: bool) -> None:
    with ranks.stream(async_decode=first) as session:
        next(session)
        ranks.try_to(lambda: ranks.stream(async_decode=second))
        next(session)
    ranks.call()


def kept_open(ranks: Ranks) -> None:
    """Rank 0's process ends with a session open."""
    session = ranks.stream()
    next(session)
    if ranks.rank == 0:
        os._exit(0)
    ranks.count(session)


def both(make: Callable[..., Case]) -> Iterator[tuple[str, Case]]:
    """A case with a synchronous and an asynchronous session."""
    yield "", make(async_decode=False, output_type="pt")
    yield ", asynchronous", make(async_decode=True, output_type="pt")


def all_cases() -> Iterator[tuple[str, int, Case]]:
    """Name, number of ranks, and what each does."""
    for name, act, size, rank in (
        ("kill -9", kill, 2, 1),
        ("kill -9", kill, 3, 0),
        ("error", fail, 2, 0),
        ("error", fail, 3, 2),
    ):
        yield f"{name} in a callback of rank {rank} of {size}", size, partial(in_callback, act=act, of_rank=rank)
    for rank in (0, 1):
        for suffix, case in both(partial(partial, in_body, act=fail, of_rank=rank)):
            yield f"error in the loop of rank {rank} of 2{suffix}", 2, case
        yield (
            f"kill -9 in an asynchronous callback of rank {rank} of 2",
            2,
            partial(in_callback, act=kill, of_rank=rank, async_decode=True, output_type="pt"),
        )
        yield f"error that nobody asks for, of rank {rank} of 2", 2, partial(unasked, of_rank=rank)
    yield "Ctrl-C in a chunk of rank 0 of 2", 2, partial(in_callback, act=interrupt, of_rank=0)
    yield "Ctrl-C in the loop of rank 0 of 2", 2, partial(in_body, act=interrupt, of_rank=0)
    yield (
        "Ctrl-C in the loop of rank 0 of 2, asynchronous",
        2,
        partial(in_body, act=interrupt, of_rank=0, async_decode=True, output_type="pt"),
    )
    yield "rank 1 of 2 encodes an image without memory", 2, encodes_an_image_without_memory
    yield "rank 1 of 2 reads a file of no text", 2, reads_a_file_of_no_text
    yield "the text encoder of rank 0 of 2 fails later", 2, text_encoder_fails_later
    yield "rank 0 of 2 ends with a session open", 2, kept_open
    ends = [(how, is_asynchronous) for is_asynchronous in (False, True) for how in ENDS]
    yield "rank 0 of 2 ends early", 2, partial(ends_early, ends=ends)
    yield "rank 0 of 3 ends early", 3, partial(ends_early, ends=[("thread", True), ("close", False), ("drop", True)])
    for how, is_asynchronous in (("break", False), ("close", True), ("KeyboardInterrupt", False), ("break", True)):
        case = partial(another_rank_ends_early, how=how, async_decode=is_asynchronous, output_type="pt")
        yield f"rank 1 of 2 ends early: {how}{', asynchronous' if is_asynchronous else ''}", 2, case
    yield "rank 0 of 3 asks for the impossible", 3, partial(refused, of_rank=0, num_frames=-1)
    yield "rank 1 of 3 asks for the impossible", 3, partial(refused, of_rank=1, num_frames=-1)
    yield "rank 1 of 2 asks for another size", 2, partial(refused, of_rank=1, height=128)
    yield "rank 1 of 2 asks for other steps", 2, partial(refused, of_rank=1, num_inference_steps=4)
    yield "rank 1 of 2 asks for another decoder", 2, partial(refused, of_rank=1, decoder=small_decoder())
    yield "the text encoder of rank 0 of 2 fails", 2, partial(text_encoder_fails, encode=lambda *a, **k: fail())
    yield "the text encoder of rank 0 of 2 has no memory", 2, partial(text_encoder_fails, encode=runs_out_of_memory)
    yield "two sessions of 2 ranks in turn", 2, two_sessions_in_turn
    yield "sessions of 2 ranks in another order", 2, sessions_in_another_order
    yield "rank 0 of 2 makes another video meanwhile", 2, another_video_meanwhile
    for first, second in ((True, True), (True, False), (False, True)):
        kinds = " beside ".join("an asynchronous" if kind else "a synchronous" for kind in (second, first))
        yield f"{kinds} session of 2 ranks", 2, partial(an_asynchronous_one_beside, first=first, second=second)


CASES = {name: (size, case) for name, size, case in all_cases()}


# -- processes ----------------------------------------------------------------------------------------------------


def be_rank(pipe: LongLivePipeline, rank: int, size: int, port: int, case: Case, report: Path) -> int:
    """Run a case as one of its ranks; return the exit status."""
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    config = ContextParallelConfig(ulysses_degree=size)
    pipe.transformer.enable_parallelism(config=config)
    dist.barrier()
    began, ranks, error = time.perf_counter(), Ranks(pipe, rank), None
    try:
        case(ranks)
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
    found = {"said": ranks.said, "error": error, "seconds": round(time.perf_counter() - began, 2)}
    report.write_text(json.dumps(found))
    if not (error or "").startswith("KeyboardInterrupt"):  # what it says when it is asked again
        ranks.said = []
        ranks.try_to(partial(ranks.call, num_frames=5))
        ranks.try_to(lambda: tiny_transformer(num_attention_heads=6).enable_parallelism(config=config))
        report.write_text(json.dumps({**found, "afterwards": ranks.said}))
    return 0 if error is None else 1


def run_case(pipe: LongLivePipeline, size: int, case: Case, folder: Path) -> list[dict]:
    port, reports = free_port(), [folder / f"rank{rank}.json" for rank in range(size)]
    for report in reports:
        report.unlink(missing_ok=True)
    children = [fork(partial(be_rank, pipe, rank, size, port, case, report)) for rank, report in enumerate(reports)]
    statuses = wait_for(children)
    found = [json.loads(report.read_text()) if report.exists() else {} for report in reports]
    return [{"exit": status, **one} for status, one in zip(statuses, found, strict=True)]


def fork(work: Callable[[], int]) -> int:
    """Start a process that does some work and exits with the status that it returns; return the process's number."""
    if child := os.fork():
        return child
    status = 3
    try:
        status = work()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait_for(children: list[int]) -> list[int | str]:
    """Exit statuses; "hangs" for those that take too long, which are ended."""
    deadline, statuses = time.monotonic() + LIMIT, {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    statuses[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    statuses[child] = "hangs"
        time.sleep(0.01)
    return [statuses[child] for child in children]


def run_cases(names: list[str], folder: Path) -> int:
    folder.mkdir()
    pipe, results = tiny_pipeline(transformer=tiny_transformer(num_attention_heads=6)), {}
    for name in names:
        began = time.perf_counter()
        size, case = CASES[name]
        results[name] = run_case(pipe, size, case, folder)
        print(f"{name} ({time.perf_counter() - began:.1f} s)", *results[name], sep="\n    ", flush=True)
    (folder / "results.json").write_text(json.dumps(results))
    return 0


def main(path: Path, *parts: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
    torch.set_num_threads(1)
    names = [name for name in CASES if not parts or any(part in name for part in parts)]
    folders = [path.parent / f"half{half}" for half in range(2)]  # which are run at the same time
    halves = [fork(partial(run_cases, names[half::2], folder)) for half, folder in enumerate(folders)]
    for half in halves:
        assert os.waitpid(half, 0)[1] == 0
    found = [json.loads((folder / "results.json").read_text()) for folder in folders]
    path.write_text(json.dumps({**found[0], **found[1]}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
