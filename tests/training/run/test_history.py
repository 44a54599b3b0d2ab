"""What a run was trained with, also where settings changed on the way."""

import pytest

from run.history import SettingsHistory


FIRST = {"learning_rate": 1e-3, "lr_scheduler": "constant", "rank": None, "compile": False}


def resumed(before: SettingsHistory, settings: dict, step: int) -> tuple[SettingsHistory, list[str]]:
    history = SettingsHistory(settings)
    history.load_state_dict(before.state_dict())
    return history, history.resume(step)


def test_nothing_is_said_where_nothing_differs():
    history, changes = resumed(SettingsHistory(FIRST), dict(FIRST), 5)
    assert changes == []
    assert history.describe("learning_rate") == "0.001"
    assert history.state_dict() == SettingsHistory(FIRST).state_dict()


@pytest.mark.parametrize(
    ("name", "value", "described"),
    [
        ("learning_rate", 1e-4, "0.001; 0.0001 from update 6 on"),
        ("lr_scheduler", "cosine", "constant; cosine from update 6 on"),
        ("rank", 4, "no; 4 from update 6 on"),
        ("compile", True, "no; yes from update 6 on"),
    ],
)
def test_what_differs_is_named_and_kept(name, value, described):
    history, changes = resumed(SettingsHistory(FIRST), FIRST | {name: value}, 5)
    assert changes == [f"{name} was {FIRST[name]} until update 5 and is {value} from there on"]
    assert history.describe(name) == described
    again, changes = resumed(history, FIRST | {name: value}, 8)
    assert changes == [] and again.describe(name) == described
    back, changes = resumed(again, FIRST, 9)
    assert len(changes) == 1
    assert back.describe(name) == f"{described}; {back.describe(name).split('; ')[-1]}"
    assert back.describe(name).endswith("from update 10 on")
