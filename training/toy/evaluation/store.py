"""The finished parts of an evaluation, kept in its folder, so that an interrupted evaluation can be resumed.

A part is a JSON file with its result and the settings that it depends on. It appears only when it is complete. A part
that exists with other settings is an error, not a reason to begin again: results of an evaluation that took an hour
should not vanish because of a typing mistake in the next.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longlive_diffusers.atomic_write import write_text


class Store:
    """
    Args:
        folder: The folder of the evaluation; created if it is missing.
        model: A string that tells the model from others; it is part of all settings.
        shared: Further settings that all parts depend on, of types that JSON has.
    """

    def __init__(self, folder: Path, model: str, **shared: Any) -> None:
        self.folder, self.shared = folder, {"model": model} | shared
        (folder / "parts").mkdir(parents=True, exist_ok=True)

    def get(self, name: str, settings: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """Return a part's result: the one that is there, or else what `compute` returns, which is then kept.

        Args:
            name: The name of the part, `section/part`.
            settings: What the result depends on besides what all parts do, of types that JSON has.
            compute: A function that returns lists, dicts, strings, numbers and booleans.

        Raises:
            ValueError: If the part is there, but of another model or other settings.
        """
        settings = json.loads(json.dumps(self.shared | settings))
        path = self.folder / "parts" / (name.replace("/", " - ") + ".json")
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            names = sorted({*settings, *kept["settings"]})
            differing = [key for key in names if settings.get(key) != kept["settings"].get(key)]
            if differing:
                then_and_now = "; ".join(
                    f"{key} was {kept['settings'].get(key)!r}, now {settings.get(key)!r}" for key in differing
                )
                raise ValueError(f"'{path}' is of other settings: {then_and_now}. Use another folder, or remove it.")
            return kept["result"]
        result = json.loads(json.dumps(compute()))
        write_text(path, json.dumps({"settings": settings, "result": result}) + "\n")
        return result


def fingerprint(folder: Path) -> str:
    """Return a digest of a model folder's weights and settings; a model retrained in place has another one."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json"):
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def fingerprint_of_file(path: Path) -> str:
    """Return a digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def digest_of(value: object) -> str:
    """Return a digest of a value whose `repr` says all about it."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
