"""Whether a pipeline on disk is complete: every component that its index names, with all of its weights.

A download that was interrupted leaves a folder that opens and then fails in the words of whichever library reads the
first missing file. Only names and headers are read here, so the check takes no time at any size.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..loaders.checkpoint_file import read_checkpoint_file
from ..loaders.names import first_names
from .config_file import read_config


_WEIGHTLESS = ("tokenizer", "scheduler")
_INDEX = ".index.json"


def check_complete(
    folder: Path,
    index: Mapping[str, Any],
    source: str | os.PathLike,
    *,
    without_weights: Collection[str] = (),
) -> None:
    """
    Check that a pipeline's folder has all that its index names.

    Args:
        folder: The folder.
        index: The content of its model_index.json.
        source: What the user calls it.
        without_weights: Components whose weights are not needed.

    Raises:
        ValueError: If a folder, a configuration or a weight file is missing, cut off or damaged.
    """
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue  # a setting of the pipeline, or a component that it does without
        if not (folder / name).is_dir():
            raise ValueError(
                f"'{source}' is incomplete: its model_index.json names {name}, and there is no such folder."
            )
        for config in sorted((folder / name).glob("*.json")):
            read_config(folder, f"{name}/{config.name}", source)
        if name in _WEIGHTLESS or name in without_weights:
            continue
        files = list(_weight_files(folder / name, source))
        if not files:
            raise ValueError(f"'{source}' is incomplete: {name} has no weights (*.safetensors).")
        for file in files:
            stored_shapes(file)


def stored_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """
    Return the shape and the dtype of every tensor in a weight file, `{name: (shape, "BF16")}`; for one that is not in
    safetensors, nothing, after checking that it can be read.

    Raises:
        ValueError: If the file is cut off or damaged, or holds Python objects.
    """
    if path.suffix != ".safetensors":
        read_checkpoint_file(path)
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return {name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is cut off, damaged or not a safetensors file: {error}") from error


def _weight_files(component: Path, source: str | os.PathLike) -> Iterator[Path]:
    """Yield a component's weight files, in the format that is loaded where there are two; for those that are in parts,
    the parts that the index of the parts names."""
    for suffix in (".safetensors", ".bin"):
        indexes, files = (sorted(component.glob(f"*{suffix}{end}")) for end in (_INDEX, ""))
        if indexes or files:
            parts = [part for index in indexes for part in _parts(component, index.name, source)]
            yield from parts if indexes else files
            return


def _parts(component: Path, index: str, source: str | os.PathLike) -> list[Path]:
    name = f"{component.name}/{index}"
    parts = read_config(component.parent, name, source).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise ValueError(f"{name} of '{source}' has no weight_map from names of weights to names of files.")
    wanted = sorted(set(parts.values()))
    if missing := [part for part in wanted if not (component / part).is_file()]:
        raise ValueError(
            f"'{source}' is incomplete: {len(missing)} of the {len(wanted)} weight files of {component.name} are "
            f"missing ({first_names(missing, 3)})."
        )
    return [component / part for part in wanted]
