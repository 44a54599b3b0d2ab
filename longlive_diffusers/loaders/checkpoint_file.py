"""Read a checkpoint file as plain tensors, and say clearly what is wrong with it when that is not possible.

Two containers are read: `torch.save` files and safetensors. A `torch.save` file is a pickle, that is, a program; it is
only ever run by torch's restricted unpickler (`weights_only=True`), which builds tensors and plain containers and
nothing else. The container is recognized by the file's first bytes: names lie, and a download that went wrong leaves
an HTML page or a Git LFS pointer under the right name.
"""

import os
import pickle
import re
import struct
import warnings
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
    b"(d": "a Python pickle, and not of the kind that torch.save writes",
    b"}q": "a Python pickle, and not of the kind that torch.save writes",
}
# What torch's restricted unpickler says of objects whose class is not the problem, but what is done with them.
_NOT_PLAIN = re.compile(r"(?:create new object for|Can only build) .* but got (.+)")
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


def named_tensors(
    content: Mapping[Any, Any], source: str, kinds: tuple[type, ...] = (torch.Tensor,)
) -> dict[str, Any]:
    """Return the tensors of a state dict that was read from a file or given by the user; other entries are left out.

    Args:
        content: The state dict.
        source: What error messages call it.
        kinds: The classes that count as tensors.

    Raises:
        ValueError: If a tensor's key is not a string, or a tensor is not an ordinary one (sparse, or quantized by
            torch).
    """
    tensors = {key: value for key, value in content.items() if isinstance(value, kinds)}
    if strange := [key for key in tensors if not isinstance(key, str)]:
        raise ValueError(
            f"{source} is no state dict: {len(strange)} of its {len(tensors)} tensors have a key that is not a name, "
            f"such as {strange[0]!r} ({type(strange[0]).__name__})."
        )
    for key, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and (tensor.layout is not torch.strided or tensor.is_quantized):
            kind = "quantized by torch" if tensor.is_quantized else f"stored as {tensor.layout}"
            raise ValueError(f"{source}: {key} is {kind}; ordinary (dense) tensors are expected.")
    return tensors


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Check that a weight is made of numbers.

    Raises:
        ValueError: If it has infinities or NaN; the message says how many.
    """
    smallest, largest = tensor.detach().aminmax()  # one pass without a temporary; NaN goes through
    if not (smallest.isfinite() and largest.isfinite()):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise ValueError(f"{name} has {bad} infinities or NaN among its {tensor.numel()} numbers ({tensor.dtype}).")


def _read_torch(path: Path, size: int, *, mmap: bool) -> Any:
    # The errors are raised "from None": torch's own recommend, at length, to load the file with weights_only=False,
    # and a traceback would print them.
    try:
        with warnings.catch_warnings():
            # About the file's age or its protocol, which say nothing about whether it can be read.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _DAMAGE as error:
        # torch wraps what its unpickler says into its advice; the context is what the unpickler said.
        said = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
        reason = " ".join(str(said).split())
    if found := re.search(r"GLOBAL (\S+)", reason) or _NOT_PLAIN.search(reason):
        raise ValueError(
            f"{path} ({size} bytes) holds Python objects ({found[1]}) beside tensors and plain containers. "
            "They could run code when loaded, so the file is refused, and nothing in it was run. If it is from a "
            "source that you trust, ask for its state dict alone, saved with torch.save, or as safetensors."
        )
    if "Unsupported operand" in reason:
        raise ValueError(
            f"{path} ({size} bytes) is a damaged checkpoint, or a Python pickle of another kind than torch.save "
            f"writes. Pickles may run code, so it is refused, and nothing in it was run ({reason})."
        )
    raise ValueError(
        f"{path} ({size} bytes) is truncated, damaged or not a torch checkpoint: {reason or 'its data end too early'}"
    )


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
