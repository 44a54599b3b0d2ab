"""The folder of a run belongs to this run alone, from its start to its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout  # torch and huggingface_hub need this package, too

from longlive_diffusers.atomic_write import remove_unfinished
from run.agreement import on_main_process
from run.checkpoints import remove_partial


LOCK = ".lock"  # stays when the run is over; what counts is whether a process holds it


@contextmanager
def output_folder(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """
    Make the folder of a run, keep other runs out of it until the block ends, and remove what a killed run left
    half-written in it. Every process has to call this.

    Raises:
        ValueError: If it cannot be made or written to, or another run is writing to it.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    on_main_process(accelerator, lambda: _claim(lock, folder))
    try:
        yield
    finally:
        lock.release()


def _claim(lock: FileLock, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        remove_unfinished(folder)
        remove_partial(folder)
    except Timeout as error:
        raise ValueError(f"--output_dir '{folder}': another run is writing to this folder") from error
    except OSError as error:
        raise ValueError(f"--output_dir '{folder}' cannot be written to: {error.strerror}") from error
