"""Checkpoints hold any number of named states, beside what accelerate saves."""

import logging
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from run.checkpoints import Checkpoints, check_steps, find_checkpoints, resolve_checkpoint, saved_in
from run.log import LOG_FILE, TrainingLog


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


def checkpoints(
    accelerator: Accelerator, folder, *, states=None, shared_states=None, identity=None, total_limit=None
) -> Checkpoints:
    return Checkpoints(
        accelerator,
        folder,
        states=states or {},
        shared_states=shared_states or {},
        total_limit=total_limit,
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


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def another_pickle(path):
    path.write_bytes(pickle.dumps({"step": 1}))


DAMAGES = [truncate, empty, zeros, flip_a_bit, remove, another_pickle]
FILES = ["training_state_0.pt", "random_states_0.pkl", "files.json"]


@pytest.fixture
def three(accelerator, tmp_path):
    """A folder with the checkpoints 1, 2 and 3."""
    for step in (1, 2, 3):
        checkpoints(accelerator, tmp_path).save(step)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_latest_passes_over_a_damaged_checkpoint_and_names_it(accelerator, three, caplog, damage, name):
    damage(three / "checkpoint-3" / name)
    with caplog.at_level(logging.WARNING, "checkpoints"):
        assert resolve_checkpoint(accelerator, three, "latest") == three / "checkpoint-2"
    (record,) = caplog.records
    assert str(three / "checkpoint-3") in record.getMessage() and name in record.getMessage()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_that_is_asked_for_is_refused(accelerator, three, damage, name):
    damage(three / "checkpoint-3" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-3.*{name}.*resume from another checkpoint") as error:
        resolve_checkpoint(accelerator, three, "checkpoint-3")
    assert "\n" not in str(error.value)


def test_if_all_are_damaged_nothing_begins_anew(accelerator, three):
    for path in find_checkpoints(three):
        zeros(path / "random_states_0.pkl")
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be resumed from .*checkpoint-3.*checkpoint-1"):
        resolve_checkpoint(accelerator, three, "latest")


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (None, r"has checkpoint-1, checkpoint-2, checkpoint-3 of an earlier run: choose another folder"),
        ("checkpoint-1", "also has checkpoint-2, checkpoint-3, which come after 'checkpoint-1'"),
        ("checkpoint-7", "There is no checkpoint 'checkpoint-7'; .* has: checkpoint-1, checkpoint-2, checkpoint-3"),
    ],
)
def test_what_a_run_would_replace_is_named(accelerator, three, requested, message):
    with pytest.raises(ValueError, match=message):
        resolve_checkpoint(accelerator, three, requested)


LEFT = {
    "checkpoint-9": "remove them",
    "model_index.json": "no checkpoint to go on from",
    "pytorch_lora_weights.safetensors": "no checkpoint to go on from",
    "README.md": "which the result of this run may replace",
    "vae": "which the result of this run may replace",
}


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("requested", [None, "latest", "elsewhere"])
def test_a_result_or_a_checkpoint_of_another_run_stays(accelerator, three, tmp_path_factory, left, requested):
    output = tmp_path_factory.mktemp("output")
    elsewhere = str(three / "checkpoint-3")
    assert resolve_checkpoint(accelerator, output, "latest") is None
    assert resolve_checkpoint(accelerator, output, elsewhere) == three / "checkpoint-3"
    (output / left).mkdir()
    with pytest.raises(ValueError, match=rf"{left}.*{LEFT[left]}"):
        resolve_checkpoint(accelerator, output, elsewhere if requested == "elsewhere" else requested)


@pytest.mark.parametrize("result", ["model_index.json", "pytorch_lora_weights.safetensors"])
def test_a_result_of_more_updates_is_not_replaced(tmp_path, result):
    """Checkpoints may be older than the result: those of every so many updates are saved."""
    log = TrainingLog(tmp_path / LOG_FILE, 0)
    for step in range(1, 7):
        log.write({"step": step, "loss": 0.5})
    check_steps(tmp_path / "checkpoint-4", 4, 5, tmp_path)  # the run was killed, and has no result
    (tmp_path / result).touch()
    check_steps(tmp_path / "checkpoint-4", 4, 6, tmp_path)
    with pytest.raises(ValueError, match=rf"has {result} of 6 updates, which those of --max_train_steps 5"):
        check_steps(tmp_path / "checkpoint-4", 4, 5, tmp_path)
    with pytest.raises(ValueError, match="has 4 updates, more than --max_train_steps 3"):
        check_steps(tmp_path / "checkpoint-4", 4, 3, tmp_path)


def test_folders_with_other_names_are_no_checkpoints(tmp_path):
    for name in (
        "checkpoint-2",
        "checkpoint-10",
        "checkpoint-²",
        "checkpoint-3.partial",
        "checkpoint-",
        "checkpoint-1a",
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_the_newest_checkpoint_of_a_run_is_never_pruned(accelerator, three):
    """Later ones that are still there are damaged; they are passed over, and do not count."""
    checkpoints(accelerator, three, total_limit=1).save(2)
    assert {path.name for path in find_checkpoints(three)} == {"checkpoint-2", "checkpoint-3"}


@pytest.mark.skipif(sys.platform != "linux", reason="looks file descriptors up in /proc")
def test_all_files_and_folders_are_synced_before_the_checkpoint_has_its_name(accelerator, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "run.seal.os.fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    saved = checkpoints(accelerator, tmp_path, states=schedulers(1)).save(1)
    partial = tmp_path / "checkpoint-1.partial"
    files = {str(partial / path.name) for path in saved.iterdir()}
    assert set(synced) == files | {str(partial), str(tmp_path)}
    assert synced[-2:] == [str(partial), str(tmp_path)]


def test_a_checkpoint_of_another_network_is_refused(accelerator, tmp_path):
    accelerator.prepare(nn.Linear(2, 2))
    saved = checkpoints(accelerator, tmp_path).save(1)
    accelerator.free_memory()
    accelerator.prepare(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"(?s)does not fit this network.*size mismatch"):
        checkpoints(accelerator, tmp_path).load(saved)


@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(accelerator, three, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("run.checkpoints.torch.save", fail)
    with pytest.raises(OSError, match=rf"checkpoint-4' could not be written: {error}"):
        checkpoints(accelerator, three).save(4)
    assert {path.name for path in three.iterdir()} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert resolve_checkpoint(accelerator, three, "latest") == three / "checkpoint-3"


def test_what_a_run_has_saved_in_its_own_folder(tmp_path, monkeypatch):
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert saved_in(tmp_path / "run", None, 0) == 0
    assert saved_in(tmp_path / "run", Path("run/checkpoint-4"), 4) == 4
    assert saved_in(tmp_path / "other", Path("run/checkpoint-4"), 4) == 0


@pytest.mark.parametrize(
    ("name", "original"), [("shutil.rmtree", shutil.rmtree), ("pathlib.Path.rename", Path.rename)]
)
def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    accelerator, tmp_path, monkeypatch, caplog, name, original
):
    writer = checkpoints(accelerator, tmp_path, total_limit=1)
    writer.save(1)

    def fails_for_old(path, *arguments, **options):
        if "checkpoint-1" in Path(path).name and not options.get("ignore_errors"):
            raise OSError(39, "Directory not empty", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(name, fails_for_old)
    writer.save(2)
    assert (tmp_path / "checkpoint-2").is_dir()
    assert ("could not be removed" in caplog.text) == (name == "pathlib.Path.rename")
