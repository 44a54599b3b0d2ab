"""What a saved pipeline's configurations should not tell: diffusers writes into each of them where it was loaded from,
which is a folder of one machine, and means nothing to whoever a pipeline is shared with."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def forget_origin(folder: str | os.PathLike, parts: Iterable[str]) -> None:
    """Take `_name_or_path` out of `model_index.json` and of the configurations of the pipeline's parts, by name: a
    folder may hold others' files, too."""
    folder = Path(folder)
    configs = (path for part in parts for path in folder.glob(f"{part}/*config.json"))
    for path in (*folder.glob("model_index.json"), *configs):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is None:
            continue
        written = path.with_name(f"{path.name}.partial")
        written.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.replace(path)
