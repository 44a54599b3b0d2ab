"""Writing a pipeline so that a folder of its name is always a complete one."""

import shutil
import uuid
from pathlib import Path

from diffusers import DiffusionPipeline


def check_output(output: Path) -> None:
    """
    Raises:
        ValueError: The folder to write is a file, or holds something.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"The output {output} is a file; give a folder that does not exist yet.")
    if output.is_dir() and (found := len(list(output.iterdir()))):
        raise ValueError(f"The output {output} already holds {found} files or folders; give a new or an empty folder.")


def save_whole(pipeline: DiffusionPipeline, output: Path) -> None:
    """Write beside `output` and rename."""
    unfinished = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}"
    unfinished.mkdir(parents=True)
    try:
        pipeline.save_pretrained(unfinished)
        if output.is_dir():
            output.rmdir()  # empty, as checked; if no longer, this raises rather than overwrites
        unfinished.rename(output)
    except BaseException:  # KeyboardInterrupt too: gigabytes must not stay behind under a hidden name
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
