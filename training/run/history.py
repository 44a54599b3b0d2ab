"""What a run was trained with. A run that is resumed may go on with other settings: they are used from there on, and
which ones were used until when stays with the run, in its checkpoints and on the card of its result."""

from itertools import pairwise
from typing import Any


Setting = str | int | float | bool | None


class SettingsHistory:
    """
    The settings of a run, with the number of updates that had been made when they came into use. It is a state of a
    checkpoint.

    Args:
        settings: The settings that the run has now, by name.
    """

    def __init__(self, settings: dict[str, Setting]):
        self.settings = settings
        self.spans: list[tuple[int, dict[str, Setting]]] = [(0, settings)]

    def state_dict(self) -> dict[str, Any]:
        """Return all settings that were ever used."""
        return {"spans": [list(span) for span in self.spans]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state: its settings come before those of this run. Call `resume` next."""
        self.spans = [(step, settings) for step, settings in state["spans"]]

    def resume(self, step: int) -> list[str]:
        """
        Let this run's settings be used after `step` updates.

        Returns:
            What differs from the settings that were used until then, one text for each.
        """
        before = self.spans[-1][1]
        if before == self.settings:
            return []
        self.spans.append((step, self.settings))
        return [
            f"{name} was {before.get(name)} until update {step} and is {value} from there on"
            for name, value in self.settings.items()
            if before.get(name) != value
        ]

    def describe(self, name: str) -> str:
        """Return a setting's value; where it changed, all of its values and from which update on they were used."""
        values = [(step, settings.get(name)) for step, settings in self.spans]
        changes = [values[0], *(new for old, new in pairwise(values) if old[1] != new[1])]
        return "; ".join(_word(value) + (f" from update {step + 1} on" if step else "") for step, value in changes)


def _word(value: Setting) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
