"""The record of a run, one JSON object a line; a run that is taken up again forgets what came after its checkpoint."""

import json
from pathlib import Path

from longlive_diffusers.atomic_write import write_text


class TrainingLog:
    """
    Args:
        path: The file.
        step: Updates that were made before; entries of later ones are removed.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))

    def write(self, entry: dict[str, float | int]) -> None:
        """Append an entry, which has a "step"."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_log(path: Path) -> list[dict[str, float | int]]:
    """All entries, in order."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Whole lines: a killed run may have left half a one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
