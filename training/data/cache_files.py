"""The files of a cache that several processes may fill, any of which may be killed at any moment.

A file is written under a temporary name, then renamed: it is either complete or not there. Its header says how long it
is and holds a checksum, so that damage done later is noticed. `settings.json` records what the content of a cache
depends on; a cache made with other settings is refused, never mixed.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from longlive_diffusers.atomic_write import new_file, write_text


SETTINGS_FILE = "settings.json"
Settings = dict[str, str | int | float | bool | None]

logger = logging.getLogger(__name__)


class DamagedFileError(ValueError):
    """A file of a cache is truncated or was changed. The message names it."""


def save_tensor(path: Path, tensor: torch.Tensor) -> None:
    """Write one tensor, with a checksum; completely or not at all."""
    tensor = tensor.detach().cpu().contiguous()
    with new_file(path) as temporary:
        save_file({"tensor": tensor}, temporary, metadata={"crc32": str(_checksum(tensor))})


def load_tensor(path: Path) -> torch.Tensor:
    """
    Read a tensor that `save_tensor` wrote.

    Raises:
        DamagedFileError: If the file is truncated, or not what was written.
        FileNotFoundError: If there is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor, metadata = file.get_tensor("tensor"), file.metadata()
    except SafetensorError as error:
        raise DamagedFileError(f"'{path}' is damaged: {error}") from error
    if metadata != {"crc32": str(_checksum(tensor))}:
        raise DamagedFileError(f"'{path}' is damaged: its content does not match its checksum")
    return tensor


def is_complete(path: Path) -> bool:
    """Whether `path` exists and is complete, as far as its header and length tell. A warning names a file that exists
    but is not complete."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt"):  # compares the length of the file with what the header says
            pass
    except SafetensorError as error:
        logger.warning("'%s' is damaged and is made again (%s)", path, error)
        return False
    return True


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, completely or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def read_json(path: Path) -> dict:
    """
    Read a JSON file of a cache.

    Raises:
        ValueError: If there is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"'{path.parent}' is no cache: it has no '{path.name}'") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedFileError(f"'{path}' is damaged: {error}") from error


def open_cache(folder: Path, settings: Settings) -> None:
    """
    Make `folder` a cache with these settings, unless it already is one.

    Raises:
        ValueError: If it is a cache with other settings; the message names those that differ, with both values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    if not path.exists():
        write_json(path, settings)
    # Also read back what was just written: if two processes write at once, one of them finds the other's settings.
    check_settings(folder, settings)


def check_settings(folder: Path, expected: Mapping[str, str | int | float | bool | None]) -> Settings:
    """
    Return the settings that a cache was made with.

    Raises:
        ValueError: If one of those `expected` differs there; the message names all that differ, with both values.
    """
    found = read_json(folder / SETTINGS_FILE)
    missing = object()
    differing = [
        f"{name} is {found.get(name, '(not recorded)')!r} there, but {value!r} here"
        for name, value in expected.items()
        if found.get(name, missing) != value
    ]
    if differing:
        raise ValueError(f"The cache '{folder}' was made with other settings: {'; '.join(differing)}")
    return found


def module_settings(name: str, module: nn.Module) -> Settings:
    """Return what a network's results depend on, its configuration and a digest of its weights, as settings of a
    cache; every key begins with `name` and a dot. The network must have a `config` like the models of diffusers or
    transformers."""
    config = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
    settings = {
        f"{name}.{key}": value if isinstance(value, str | int | float | bool) else json.dumps(value, default=str)
        for key, value in sorted(config.items())
        if not key.startswith("_") and key not in ("transformers_version", "torch_dtype", "dtype")
    }
    digest, dtypes = hashlib.sha256(), set()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
        dtypes.add(str(tensor.dtype))
    return {**settings, f"{name}.dtype": ", ".join(sorted(dtypes)), f"{name}.weights": digest.hexdigest()}


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(_bytes(tensor))
