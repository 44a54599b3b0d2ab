"""Find the file of a LoRA - on disk or on the Hub - and read it with the settings that are stored in it or beside it.

diffusers' own search asks the Hub about every name that is no file, and tells of a missing network in the words of the
network's library; and it does not read PEFT's `adapter_config.json`, in which PEFT keeps alpha.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
)
from safetensors import safe_open

from ..user_path import user_path
from .checkpoint_file import read_checkpoint_file
from .names import first_names


LORA_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_ADAPTER_CONFIG = "adapter_config.json"  # PEFT's settings, beside its weights
# In this order, if a folder holds several.
_USUAL_NAMES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
    "lora.pt",
)
# The names under which alpha stands in the metadata of safetensors files, besides PEFT's.
_ALPHA_NAMES = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_UNREACHABLE = (HfHubHTTPError, HFValidationError, EntryNotFoundError, OfflineModeIsEnabled)


@dataclass(frozen=True)
class LoraFile:
    """
    A LoRA as it is stored.

    Args:
        source: What error messages call it.
        content: The stored dictionary, of which each kind of LoRA has a layout of its own.
        settings: PEFT's settings (`r`, `lora_alpha`, `use_rslora`, `alpha_pattern`), those of them that are known.
        metadata: diffusers' own settings (`transformer.lora_alpha`, ...), as it hands them to PEFT.
    """

    source: str
    content: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] | None = None


def read_lora_file(path: Path) -> LoraFile:
    """
    Read a weight file of a LoRA.

    Raises:
        ValueError: If the file, its metadata or the `adapter_config.json` beside it is damaged.
    """
    content = read_checkpoint_file(path)
    stored = _stored_metadata(path)
    alpha = next((_number(stored[name], path) for name in _ALPHA_NAMES if name in stored), None)
    settings: dict[str, Any] = {} if alpha is None else {"lora_alpha": alpha}
    metadata = None
    if "lora_adapter_metadata" in stored:
        described = _json_object(stored["lora_adapter_metadata"], f"{path} (its lora_adapter_metadata)")
        if any(name.startswith("transformer.") for name in described):
            metadata = described
        else:
            settings |= described
    if (beside := path.with_name(_ADAPTER_CONFIG)).is_file():
        settings = _json_object(beside.read_text(encoding="utf-8", errors="replace"), str(beside)) | settings
    return LoraFile(str(path), content, settings, metadata)


def find_lora_file(
    source: str | os.PathLike, *, weight_name: str | None = None, subfolder: str | None = None, **hub_options: Any
) -> Path:
    """
    Return the weight file of a LoRA that is given as a file, a folder or a repository of the Hub.

    Args:
        source: The file, folder or repository.
        weight_name: The name of the file in a folder or repository; without it, the one that has a usual name, or the
            only one.
        subfolder: The folder of the file in a folder or repository.
        **hub_options: Arguments of `huggingface_hub.hf_hub_download`, such as `token` or `revision`.

    Raises:
        ValueError: If there is no such file, folder or repository that can be reached, or it holds no weight file, or
            several and none with a usual name.
    """
    path = user_path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / (subfolder or "") / _choose(_files_below(path), str(source), weight_name, subfolder)
    if path.suffix in LORA_SUFFIXES:
        raise ValueError(f"There is no LoRA file '{source}'.")
    try:
        return _download(str(source), weight_name, subfolder, hub_options)
    except _UNREACHABLE as error:
        raise ValueError(
            f"The LoRA '{source}' is no file, no folder, and no Hub repository that can be reached: {error}"
        ) from error


def _download(repo: str, weight_name: str | None, subfolder: str | None, hub_options: Mapping[str, Any]) -> Path:
    local_options = {name: hub_options[name] for name in ("cache_dir", "revision", "token") if name in hub_options}
    try:
        if hub_options.get("local_files_only"):
            raise DryRunError("asked not to download")
        infos = snapshot_download(repo, **local_options, dry_run=True)
        names = [info.filename for info in infos]
    except DryRunError:  # offline: what was downloaded before has to do
        folder = snapshot_download(repo, **local_options, allow_patterns=[_ADAPTER_CONFIG], local_files_only=True)
        return Path(folder) / (subfolder or "") / _choose(_files_below(Path(folder)), repo, weight_name, subfolder)
    chosen = _choose(names, repo, weight_name, subfolder)
    if (beside := f"{subfolder}/{_ADAPTER_CONFIG}" if subfolder else _ADAPTER_CONFIG) in names:
        hf_hub_download(repo, beside, **hub_options)
    return Path(hf_hub_download(repo, chosen, subfolder=subfolder, **hub_options))


def _files_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _choose(names: Iterable[str], source: str, weight_name: str | None, subfolder: str | None) -> str:
    """Return the weight file among files that are named from the top; its name is from the subfolder."""
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    here = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    if weight_name is not None:
        if weight_name not in here:
            raise ValueError(f"The LoRA '{source}' has no file {prefix}{weight_name}; it has {_list(here)}.")
        return weight_name
    weights = [name for name in here if "/" not in name and name.endswith(LORA_SUFFIXES)]
    chosen = next((name for name in _USUAL_NAMES if name in weights), None)
    if chosen is None and len(weights) != 1:
        what = f"{len(weights)} weight files ({_list(weights)}): name one" if weights else "no weight file"
        raise ValueError(f"The LoRA '{source}' has {what}; it has {_list(here)}.")
    return chosen or weights[0]


def _list(names: list[str]) -> str:
    return first_names(names, 5) or "nothing"


def _stored_metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        if file.read(9)[8:9] != b"{":  # not a safetensors file, whatever its name
            return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _json_object(text: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds a {type(content).__name__}, not an object.")
    return content


def _number(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{path} has metadata in which alpha is {text!r}, which is no number.") from error
