"""The log of a run, one JSON object per line. A resumed run drops the entries that came after its checkpoint."""

import json
from pathlib import Path

from accelerate import Accelerator

from longlive_diffusers.atomic_write import write_text


class TrainingLog:
    """
    Args:
        path: The log file.
        step: The number of updates that were made before; entries of later ones are removed.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))

    def write(self, entry: dict[str, float | int]) -> None:
        """Append an entry, which has a "step"."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def check_tracker(accelerator: Accelerator, name: str | None) -> None:
    """Raise a ValueError if the package of a tracker is not installed: accelerate would go on without a word."""
    if name is not None and not accelerator.log_with:
        raise ValueError(f"--report_to {name} needs a package that is not installed: pip install {name}")


def read_log(path: Path) -> list[dict[str, float | int]]:
    """Return all entries, in order."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Return the complete lines; a killed run may have left half a line at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
