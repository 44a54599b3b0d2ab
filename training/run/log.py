"""The log of a run, one JSON object per line. A resumed run drops the entries that came after its checkpoint."""

import json
from pathlib import Path

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from longlive_diffusers.atomic_write import write_text


LOG_FILE = "training_log.jsonl"  # in the output folder


class TrainingLog:
    """
    Args:
        path: The log file.
        step: The number of updates that were made before; entries of later ones are removed.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [entry for entry in read_log(path) if entry["step"] <= step]
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, entry: dict[str, float | int]) -> None:
        """Append an entry, which has a "step"."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def check_tracker(name: str | None) -> None:
    """Raise a ValueError if there is no such tracker, or its package is not installed: accelerate would go on without
    a word."""
    available = [tracker.value for tracker in get_available_trackers()]
    if name not in (None, LoggerType.ALL.value, *available):
        raise ValueError(
            f"--report_to {name} is no tracker whose package is installed; those that are: "
            f"{', '.join(available) or 'none'} (accelerate knows {', '.join(LoggerType.list())})"
        )


def read_log(path: Path) -> list[dict[str, float | int]]:
    """Return all entries, in order. Lines that are none are left out: a killed run may have left half a line, and a
    power cut zeros."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [entry for entry in entries if isinstance(entry, dict) and "step" in entry]
