"""Read the configuration files of a pipeline, and say clearly what is wrong with one."""

import os
from pathlib import Path
from typing import Any

from ..json_files import parse_json


def read_config(folder: Path, name: str, source: str | os.PathLike) -> dict[str, Any]:
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
        content = parse_json((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"'{source}' is not a pipeline: it has no {name}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} of '{source}' is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} of '{source}' {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} of '{source}' holds a {type(content).__name__}, not an object")
    return content
