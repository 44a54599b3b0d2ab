"""What a saved pipeline's configurations should not tell: diffusers writes into each of them where it was loaded from,
which is a folder of one machine, and means nothing to whoever a pipeline is shared with."""

import json
import os
from pathlib import Path


def forget_origin(folder: str | os.PathLike) -> None:
    """Take `_name_or_path` out of `model_index.json` and of the parts' configurations."""
    for path in (*Path(folder).glob("model_index.json"), *Path(folder).glob("*/*config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is None:
            continue
        written = path.with_name(f"{path.name}.partial")
        written.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.replace(path)
