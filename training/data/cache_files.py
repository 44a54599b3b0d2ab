"""The files of a cache that several processes may fill, any of which may be killed at any moment.

A file is written under a temporary name, then renamed: it is either complete or not there. Its header says how long it
is and holds a checksum, so that damage done later is noticed. `settings.json` records what the content of a cache
depends on; a cache made with other settings is refused, never mixed. It is written when the first tensor is.
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
from longlive_diffusers.json_files import read_json


SETTINGS_FILE = "settings.json"
TENSOR_SUFFIX = ".safetensors"
Setting = str | int | float | bool | None
Settings = dict[str, Setting]

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
        DamagedFileError: If the file is truncated, not what was written, or cannot be read.
        FileNotFoundError: If there is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor, metadata = file.get_tensor("tensor"), file.metadata()
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
    if metadata != {"crc32": str(_checksum(tensor))}:
        raise damaged(path, "its content does not match its checksum")
    return tensor


def damaged(path: Path, reason: object) -> DamagedFileError:
    """Return the error that a file with a tensor is damaged, which says what to do."""
    return DamagedFileError(f"'{path}' is damaged: {reason}; delete it and build the cache again")


def is_complete(path: Path) -> bool:
    """Whether `path` exists and is complete, as far as its header and length tell. A warning names a file that exists
    but is not complete."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt"):  # compares the length of the file with what the header says
            pass
    except (SafetensorError, OSError) as error:
        logger.warning("'%s' is damaged and is made again (%s)", path, error)
        return False
    return True


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, completely or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def read_cache_json(path: Path) -> dict:
    """
    Read a JSON file of a cache, which has to hold an object.

    Raises:
        DamagedFileError: If it holds something else, or cannot be read.
        ValueError: If there is no such file.
    """
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"'{path.parent}' is no cache: it has no '{path.name}'") from error
    except ValueError as error:
        raise DamagedFileError(f"'{path}' is damaged: it {error}") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"'{path}' is damaged: it holds no JSON object")
    return content


def check_cache(folder: Path, settings: Settings) -> None:
    """
    Check that what is in a folder was made with these settings, or that nothing is there; nothing is written.

    Raises:
        ValueError: If it was made with other settings; the message names those that differ, with both values, and says
            what to do. Or if it has encoded files, but no record of their settings.
    """
    if (folder / SETTINGS_FILE).exists():
        check_settings(folder, settings)
    elif any(folder.glob(f"*{TENSOR_SUFFIX}")):
        raise DamagedFileError(
            f"'{folder}' has encoded files, but no '{SETTINGS_FILE}' that says how they were made: delete the folder, "
            "so that they are made again"
        )


def create_cache(folder: Path, settings: Settings) -> None:
    """
    Make `folder` a cache with these settings, unless it already is one. This is done when its first tensor is there to
    be written, not before: a start that fails leaves nothing that refuses other settings.

    Raises:
        ValueError: As in `check_cache`, or if the folder cannot be created.
    """
    check_cache(folder, settings)
    path = folder / SETTINGS_FILE
    if path.exists():
        return
    make_folder(folder)
    write_json(path, settings)
    # Also read back what was just written: if two processes write at once, one of them finds the other's settings.
    check_settings(folder, settings)


def make_folder(folder: Path) -> None:
    """
    Create the folder of a cache and its parents, unless there is one.

    Raises:
        ValueError: If that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The cache '{folder}' cannot be written: {error.strerror} ('{error.filename}')") from error


def check_settings(folder: Path, expected: Mapping[str, Setting]) -> Settings:
    """
    Return the settings that a cache was made with.

    Raises:
        ValueError: If one of those `expected` differs there; the message names all that differ, with both values, and
            says what to do.
    """
    found = read_settings(folder)
    compare_settings(folder, found, expected)
    return found


def read_settings(folder: Path) -> Settings:
    """
    Return the settings that a cache was made with.

    Raises:
        DamagedFileError: If their file is damaged.
        ValueError: If the folder is no cache.
    """
    try:
        return read_cache_json(folder / SETTINGS_FILE)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; delete the folder, so that the cache is made again") from error


def compare_settings(folder: Path, found: Mapping[str, Setting], expected: Mapping[str, Setting]) -> None:
    """
    Raises:
        ValueError: If a setting in `found`, which is recorded in the folder, is not as expected; see `check_settings`.
    """
    differing = [
        f"{name} is {found[name]!r} there, but {value!r} here"
        if name in found
        else f"{name} is not recorded there, but {value!r} here"
        for name, value in expected.items()
        if name not in found or found[name] != value
    ]
    if differing:
        raise ValueError(
            f"The cache '{folder}' was made with other settings: {'; '.join(differing)}. Use its settings or another "
            "--data_cache_dir; or delete the folder, so that it is made again"
        )


def whole_number(folder: Path, settings: Settings, name: str) -> int:
    """
    Return a setting that must be a whole number of at least 1.

    Raises:
        DamagedFileError: If it is something else.
    """
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DamagedFileError(
            f"'{folder / SETTINGS_FILE}' is damaged: {name} must be a whole number of at least 1, but it is {value!r}"
        )
    return value


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
