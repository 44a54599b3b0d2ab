"""Checkpoints hold any number of named states, beside what accelerate saves."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from run.checkpoints import Checkpoints, find_checkpoints, remove_partial


@pytest.fixture
def accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    yield accelerator
    accelerator.free_memory()


def schedulers(count: int) -> dict[str, torch.optim.lr_scheduler.LRScheduler]:
    """Schedules of several optimizers, as two networks that are trained in turn have them."""
    optimizers = [torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0) for _ in range(count)]
    return {
        f"schedule_{index}": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for index, optimizer in enumerate(optimizers)
    }


def checkpoints(accelerator: Accelerator, folder, *, states=None, shared_states=None, identity=None) -> Checkpoints:
    return Checkpoints(
        accelerator,
        folder,
        states=states or {},
        shared_states=shared_states or {},
        total_limit=None,
        identity=identity or {"seed": 0},
    )


def test_every_named_state_comes_back(accelerator, tmp_path):
    states, shared = schedulers(3), schedulers(2)
    shared = {f"shared_{name}": state for name, state in shared.items()}
    for index, state in enumerate((*states.values(), *shared.values())):
        for _ in range(index):
            state.optimizer.step()
            state.step()
    saved = checkpoints(accelerator, tmp_path, states=states, shared_states=shared).save(7)
    assert find_checkpoints(tmp_path) == [saved]
    fresh = schedulers(3)
    fresh_shared = {f"shared_{name}": state for name, state in schedulers(2).items()}
    assert checkpoints(accelerator, tmp_path, states=fresh, shared_states=fresh_shared).load(saved) == 7
    learning_rates = [state.get_last_lr()[0] for state in (*fresh.values(), *fresh_shared.values())]
    assert learning_rates == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]


def test_a_checkpoint_gives_way_to_one_of_the_same_step(accelerator, tmp_path):
    for learning_rate_steps in (1, 2):
        states = schedulers(1)
        for _ in range(learning_rate_steps):
            states["schedule_0"].optimizer.step()
            states["schedule_0"].step()
        saved = checkpoints(accelerator, tmp_path, states=states).save(3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    fresh = schedulers(1)
    assert checkpoints(accelerator, tmp_path, states=fresh).load(saved) == 3
    assert fresh["schedule_0"].get_last_lr() == [1 / 4]


def test_a_state_that_the_checkpoint_lacks_is_named(accelerator, tmp_path):
    saved = checkpoints(accelerator, tmp_path, states=schedulers(1)).save(1)
    with pytest.raises(ValueError, match="has no state 'schedule_1'"):
        checkpoints(accelerator, tmp_path, states=schedulers(2)).load(saved)


def test_another_run_is_refused_with_what_differs(accelerator, tmp_path):
    saved = checkpoints(accelerator, tmp_path, identity={"seed": 0, "rank": None}).save(1)
    with pytest.raises(ValueError, match="seed is 0 there and 1 here; rank is None there and 8 here"):
        checkpoints(accelerator, tmp_path, identity={"seed": 1, "rank": 8}).load(saved)


@pytest.mark.parametrize("name", ["step", "identity"])
def test_names_that_are_taken_are_refused(accelerator, tmp_path, name):
    (state,) = schedulers(1).values()
    with pytest.raises(ValueError, match="need names of their own"):
        checkpoints(accelerator, tmp_path, states={name: state})
    with pytest.raises(ValueError, match="need names of their own"):
        checkpoints(accelerator, tmp_path, states={"ema": state}, shared_states={"ema": state})


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    kept = {"checkpoint-2", "result", "log.jsonl", ".hidden", "download.partial", ".download.partial"}
    left = {"checkpoint-4.partial", ".result.0123abcd.partial", ".log.jsonl.89efcdab.partial"}
    for name in kept | left:
        if "log" in name or "load" in name:
            (tmp_path / name).write_text("text")
        else:
            (tmp_path / name / "transformer").mkdir(parents=True)
    remove_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
