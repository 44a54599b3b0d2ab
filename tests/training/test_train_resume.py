"""A run that was killed goes on as if it had not been: the same losses, to the last bit, and the same result."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from objectives.teacher_forcing import TeacherForcing
from run.interruption import StopRequest
from run.log import read_log
from tests.support import processes
from tests.support.processes import ForkedRun
from tests.support.training_run import LONG_RUN, SCRIPT, environment


LOG = "training_log.jsonl"
WITHOUT_RECYCLING = {name: None for name in LONG_RUN if name.startswith("error_")} | {"error_recycling": False}


def start(workshop, output: Path) -> ForkedRun:
    words = workshop.options(output, **LONG_RUN, resume_from_checkpoint="latest")
    return processes.start([SCRIPT, *words], environment())


def kill(run: ForkedRun) -> None:
    assert run.poll() is None, run.errors[-4000:]
    run.kill()


def kill_while_writing(workshop, output: Path, pattern: str) -> None:
    """Kill a run so that something half-written stays; what is complete before the signal arrives is tried again."""
    for _ in range(5):
        run = start(workshop, output)
        while run.poll() is None and not list(output.glob(pattern)):
            time.sleep(0.0005)
        run.kill()
        assert run.poll() in (0, -signal.SIGKILL), run.errors[-4000:]
        if list(output.glob(pattern)):
            return
    raise AssertionError(f"{pattern} was never seen half-written")


def wait_for(run: ForkedRun, happened) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert run.poll() is None, run.errors[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def last_step(output: Path) -> int:
    log = output / LOG
    return read_log(log)[-1]["step"] if log.exists() and log.stat().st_size else 0


def test_a_run_killed_six_times_gives_the_uninterrupted_one(workshop, long_run, tmp_path):
    output, rng = tmp_path / "run", random.Random(time.time_ns())
    resumed_at = []
    half_written = {3: "checkpoint-*.partial", 5: ".result.*.partial"}
    for number, after in enumerate((2, 7, 12, 17, 23, 28)):
        if number in half_written:
            kill_while_writing(workshop, output, half_written[number])
        else:
            run = start(workshop, output)
            wait_for(run, lambda after=after: last_step(output) >= after)
            time.sleep(rng.uniform(0, 0.3))
            kill(run)
        checkpoints = sorted(int(path.name[11:]) for path in output.glob("checkpoint-*") if path.suffix != ".partial")
        resumed_at.append(checkpoints[-1] if checkpoints else 0)
    assert resumed_at[-1] > 0
    run = start(workshop, output)
    assert run.wait() == 0, run.errors[-4000:]

    ours, theirs = read_log(output / LOG), read_log(long_run / LOG)
    assert ours == theirs  # every loss, gradient norm and learning rate, bit for bit
    name = "transformer/diffusion_pytorch_model.safetensors"
    weights, expected = load_file(output / name), load_file(long_run / name)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert not list(output.glob("*.partial")) and not (output / "result").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"rank": 4}, "rank is None there and 4 here"),
        ({"optimizer": "muon"}, "optimizer is adamw there and torch.optim.Muon here"),
        ({"ema_decay": 0.5}, "ema_decay is 0.9 there and 0.5 here"),
        (WITHOUT_RECYCLING, "error_recycling is True there and False here"),
        ({"error_bucket_size": 4}, "error_bucket_size is 3 there and 4 here"),
        ({"train_batch_size": 1}, "batch is 2 there and 1 here"),
        ({"max_train_steps": 27}, "has 28 updates, more than --max_train_steps 27"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_may_not_change_is_named(workshop, long_run, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        workshop.main(tmp_path / "run", **LONG_RUN | changed, resume_from_checkpoint=long_run / "checkpoint-28")


def test_what_changes_is_used_named_and_on_the_card(workshop, long_run, tmp_path, caplog):
    """Learning rate, schedule, decays and clipping are those of the command line, not those of the checkpoint."""
    changed = {"learning_rate": 2e-4, "lr_scheduler": "linear", "lr_warmup_steps": 0, "max_train_steps": 32}
    changed |= {"adam_beta1": 0.5, "adam_weight_decay": 0.1, "max_grad_norm": 0.01, "checkpointing_steps": 32}
    output = tmp_path / "run"
    with caplog.at_level("INFO"):
        workshop.main(output, **LONG_RUN | changed, resume_from_checkpoint=long_run / "checkpoint-28")
    for name, before in {"learning_rate": 0.0003, "lr_scheduler": "cosine", "lr_warmup_steps": 3}.items():
        assert f"{name} was {before} until update 28 and is {changed[name]} from there on" in caplog.text
    rates = [entry["learning_rate"] for entry in read_log(output / LOG)]
    assert rates == pytest.approx([2e-4 * (32 - step) / 32 for step in range(28, 32)])  # what it was used at
    optimizer = torch.load(output / "checkpoint-32" / "optimizer.bin", weights_only=True)
    (group,) = optimizer["param_groups"]
    assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.5, 0.999), 0.1, 2e-4)
    card = (output / "README.md").read_text()
    assert "| learning rate | 0.0003; 0.0002 from update 29 on |" in card
    assert "| schedule | cosine; linear from update 29 on |" in card
    assert "| gradients clipped to a norm of | 1.0; 0.01 from update 29 on |" in card


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_end_leaves_a_checkpoint_and_goes_on(
    workshop, long_run, tmp_path, monkeypatch, caplog, number
):
    """The signal comes in the middle of update 6, of which and only of which there is no other checkpoint."""
    output, prepare, updates = tmp_path / "run", TeacherForcing.prepare, []

    def interrupted(objective, batch, step, device):
        updates.append(step)
        if step == 5:
            os.kill(os.getpid(), number)
        return prepare(objective, batch, step, device)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(TeacherForcing, "prepare", interrupted)
        workshop.main(output, **LONG_RUN)
    assert ended.value.code == 128 + number
    assert updates[-1] == 5 and last_step(output) == 6
    assert f"ended by {number.name} after update 6 of 30; go on with --resume_from_checkpoint latest" in caplog.text
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    workshop.main(output, **LONG_RUN, resume_from_checkpoint="latest")
    ours, theirs = ([entry["loss"] for entry in read_log(folder / LOG)] for folder in (output, long_run))
    assert ours == pytest.approx(theirs, rel=1e-3)  # as far as threads may round


def test_a_folder_that_is_no_checkpoint_is_refused(workshop, tmp_path):
    with pytest.raises(ValueError, match="it is no checkpoint of this script"):
        workshop.main(tmp_path / "run", resume_from_checkpoint=workshop.folder / "videos")


def test_a_run_that_goes_on_in_another_folder_and_ends_before_an_update_can_go_on_there(
    workshop, long_run, tmp_path, monkeypatch, caplog
):
    output, checkpoint = tmp_path / "run", long_run / "checkpoint-28"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(StopRequest, "agreed", lambda _: signal.SIGTERM)
        workshop.main(output, **LONG_RUN, resume_from_checkpoint=checkpoint)
    assert "after update 28 of 30; go on with --resume_from_checkpoint latest" in caplog.text
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-28"]
    workshop.main(output, **LONG_RUN, resume_from_checkpoint="latest")
    assert [entry["step"] for entry in read_log(output / LOG)] == [29, 30]
