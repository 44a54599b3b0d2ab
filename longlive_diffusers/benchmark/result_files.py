"""Reports as files: JSON with everything, and Markdown to read, under a name that says what was measured."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from ..atomic_write import check_new_file, shortened, write_text
from ..user_path import user_path
from .table import as_markdown


def check_results_folder(folder: str | os.PathLike) -> Path:
    """Check, before long work, that files can be created in a folder.

    Returns:
        The folder, with `~` resolved.

    Raises:
        ValueError: If it is missing, is no folder, or cannot be written to.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        reason = "it is not a folder" if folder.exists() else f"the folder '{folder}' does not exist"
        raise ValueError(f"Cannot write into '{folder}': {reason}")
    check_new_file(folder / "report.json")
    return folder


def result_name(report: dict[str, Any]) -> str:
    """Return `date_size_device_setting`, in which a comparison has both settings."""
    setting, (first, *others) = report["setting"], report["labels"]
    parts = [setting["date"][:10], setting["size"], setting["device"], first]
    return "_".join(map(slug, parts + [part for other in others for part in ("vs", other)]))


def slug(text: str) -> str:
    """Return a text as a part of a file's name, on every system."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-.").lower()


def write_results(folder: Path, report: dict[str, Any]) -> Path:
    """Write the report as `NAME.json` and `NAME.md`; where there is one of that name already, `NAME-2`, and so on.

    Returns:
        The file of JSON.

    Raises:
        OSError: If one of them cannot be written. If it is the Markdown, the JSON stays: it has all that was measured.
    """
    stem = shortened(result_name(report), len("-9999.json"))
    path = _reserve(folder, stem)
    try:
        write_text(path, as_json(report))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    write_text(path.with_suffix(".md"), as_markdown(report))
    return path


def as_json(report: dict[str, Any]) -> str:
    """Return the report as the text of a file; numbers that JSON does not know, which are not finite, are null."""
    return json.dumps(_with_nulls(report), indent=2, allow_nan=False) + "\n"


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reserve(folder: Path, stem: str) -> Path:
    """Create an empty file of a new name, so that no other process takes it; there is no table of that name either."""
    number = 1
    while True:
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        number += 1
        try:
            if not path.with_suffix(".md").exists():
                path.touch(exist_ok=False)
                return path
        except FileExistsError:
            pass
