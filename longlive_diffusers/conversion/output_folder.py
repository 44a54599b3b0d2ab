"""The folder that a pipeline is written to: checked before any work, filled under another name, and renamed."""

import os
import shutil
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from torch import nn

from ..atomic_write import new_folder
from ..user_path import user_path


def prepare_output(output: str | os.PathLike) -> Path:
    """
    Check that a folder can be written, and return where it is: absolute, without links and "..".

    Raises:
        ValueError: If it is a file, is not empty, or cannot be created where it is to be.
    """
    if not os.fspath(output) or "\0" in os.fspath(output):
        raise ValueError(f"The output {os.fspath(output)!r} is no name; give a folder that does not exist yet.")
    try:
        folder = user_path(output).resolve()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"The output {output} is a file; give a folder that does not exist yet.")
        if folder.is_dir() and (found := len(list(folder.iterdir()))):
            raise ValueError(
                f"The output {output} already holds {found} files or folders; give a new or an empty folder."
            )
        _check_writable(folder, output)
    except (OSError, RuntimeError) as error:  # RuntimeError: a "~" or a chain of links that leads nowhere
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"The output {output} cannot be written: {reason}.") from error
    return folder


def save_atomically(pipeline: DiffusionPipeline, folder: Path, card: ModelCard) -> None:
    """
    Save a pipeline so that the folder appears under its name only when it is complete.

    Args:
        pipeline: The pipeline.
        folder: The folder, as `prepare_output` returns it.
        card: Its model card.

    Raises:
        OSError: If the disk has no room for it, or fails; nothing is left of it then.
    """
    models = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    needed = sum(tensor.nbytes for model in models for tensor in model.state_dict().values())
    free = shutil.disk_usage(_nearest(folder)).free
    if needed > free:
        raise OSError(f"{folder} needs {needed / 2**30:.2f} GiB, and its disk has {free / 2**30:.2f} GiB left.")
    with new_folder(folder) as unfinished:
        card.save(unfinished / "README.md")  # first: otherwise saving writes one that names the unfinished folder
        pipeline.save_pretrained(unfinished)


def _check_writable(folder: Path, output: str | os.PathLike) -> None:
    parent = _nearest(folder.parent)
    if not parent.is_dir():
        raise ValueError(f"The output {output} cannot be written: {parent} is not a folder.")
    (parent / f".{folder.name}.00000000.partial").exists()  # raises where the name is too long for the disk
    with tempfile.TemporaryFile(dir=parent):  # raises where nothing can be written
        pass


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
