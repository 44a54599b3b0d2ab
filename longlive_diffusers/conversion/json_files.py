"""Read the configuration files of a pipeline, and say clearly what is wrong with one."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(folder: Path, name: str, source: str | os.PathLike) -> dict[str, Any]:
    """
    Read one configuration file of a pipeline.

    Args:
        folder: The folder of the pipeline.
        name: The file in it, for instance `vae/config.json`.
        source: What the user calls the pipeline, for error messages.

    Raises:
        ValueError: If there is no such file, or it is not a JSON object.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"'{source}' is not a pipeline: it has no {name}") from error
    except RecursionError as error:
        raise ValueError(f"{name} of '{source}' is not a configuration: it is nested too deeply") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{name} of '{source}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} of '{source}' holds a {type(content).__name__}, not an object")
    return content
