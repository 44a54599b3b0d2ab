"""Read a checkpoint file as plain tensors, and say clearly what is wrong with it when that is not possible.

Two containers are read: `torch.save` files and safetensors. A `torch.save` file is a pickle, that is, a program; it is
only ever run by torch's restricted unpickler (`weights_only=True`), which builds tensors and plain containers and
nothing else. The container is recognized by the file's first bytes: names lie, and a download that went wrong leaves
an HTML page or a Git LFS pointer under the right name.
"""

import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch


_FOREIGN_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer (the weights themselves were not downloaded; run `git lfs pull`)",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a RIFF file (WebP, WAV or AVI)",
    b"GGUF": "a GGUF file",
    b"<!DOCTYPE": "an HTML page",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"{": "a JSON file",
}
_ZIP_START = b"PK\x03\x04"
_PICKLE_START = b"\x80"

# What torch.load raises for damaged bytes depends on where the damage is; these errors were seen with files that were
# cut or altered at random. (UnicodeDecodeError is a ValueError, KeyError and IndexError are LookupErrors.)
_DAMAGE = (
    RuntimeError,
    pickle.PickleError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)


def read_checkpoint_file(path: str | os.PathLike) -> dict[str, Any]:
    """Read a `.pt`/`.pth` (`torch.save`) or `.safetensors` file.

    Tensors are on the CPU and, except in files older than torch 1.6, mapped from the file rather than read, so looking
    at names and shapes is cheap at any size.

    Returns:
        The stored dictionary: a state dict, or one or more of them wrapped in other dictionaries.

    Raises:
        ValueError: If the file is missing, a directory, empty, truncated, damaged or of another kind, or if it holds
            Python objects that cannot be loaded safely, or something other than a dictionary.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a directory, not a checkpoint file. A diffusers model opens with from_pretrained."
        )
    if not path.is_file():
        raise ValueError(f"There is no checkpoint file {path}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)

    if start.startswith(_ZIP_START):
        content = _read_torch(path, size, mmap=True)
    elif start[8:9] == b"{" or (path.suffix == ".safetensors" and not _foreign_kind(start)):
        content = _read_safetensors(path, size)
    elif start.startswith(_PICKLE_START):
        content = _read_torch(path, size, mmap=False)  # the container torch wrote before 1.6 cannot be mapped
    else:
        raise ValueError(
            f"{path} ({size} bytes) is not a checkpoint: it is {_foreign_kind(start) or 'of no known kind'}."
        )
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors.")
    return dict(content)


def _read_torch(path: Path, size: int, *, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _DAMAGE as error:
        # torch's own message recommends loading with weights_only=False; only its last part is useful.
        reason = " ".join(str(error).split("WeightsUnpickler error:")[-1].split("\n\nCheck the doc")[0].split())
        if "Unsupported global" in reason:
            kind = reason.split("GLOBAL ")[-1].split(" ")[0]
            raise ValueError(
                f"{path} ({size} bytes) holds Python objects ({kind}) beside tensors and plain containers. "
                "They could run code when loaded, so the file is refused. "
                "Save its state dict alone with torch.save and load that."
            ) from error
        raise ValueError(
            f"{path} ({size} bytes) is truncated, damaged or not a torch checkpoint: {reason or type(error).__name__}"
        ) from error


def _read_safetensors(path: Path, size: int) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} ({size} bytes) is truncated, damaged or not a safetensors file: {error}") from error


def _foreign_kind(start: bytes) -> str | None:
    if not start:
        return "empty"
    if start[4:8] == b"ftyp":
        return "an MP4 video"
    return next((kind for prefix, kind in _FOREIGN_STARTS.items() if start.startswith(prefix)), None)
