"""A run that was killed goes on as if it had not been: the same losses, to the last bit, and the same result."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_ar
from run.arguments import parse_arguments
from run.log import read_log
from tests.support.training_run import LONG_RUN, SCRIPT, environment


LOG = "training_log.jsonl"


def start(workshop, output: Path) -> subprocess.Popen:
    words = workshop.options(output, **LONG_RUN, resume_from_checkpoint="latest")
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill(run: subprocess.Popen) -> None:
    assert run.poll() is None, run.stderr.read().decode()[-4000:]
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def kill_while_writing(workshop, output: Path, pattern: str) -> None:
    """Kill a run so that something half-written stays; what is complete before the signal arrives is tried again."""
    for _ in range(5):
        run = start(workshop, output)
        while run.poll() is None and not list(output.glob(pattern)):
            time.sleep(0.0005)
        if run.poll() is None:
            kill(run)
        assert run.returncode in (0, -signal.SIGKILL), run.stderr.read().decode()[-4000:]
        if list(output.glob(pattern)):
            return
    raise AssertionError(f"{pattern} was never seen half-written")


def wait_for(run: subprocess.Popen, happened) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert run.poll() is None, run.stderr.read().decode()[-4000:]
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
    assert run.wait() == 0, run.stderr.read().decode()[-4000:]

    ours, theirs = read_log(output / LOG), read_log(long_run / LOG)
    assert ours == theirs  # every loss, gradient norm and learning rate, bit for bit
    name = "transformer/diffusion_pytorch_model.safetensors"
    weights, expected = load_file(output / name), load_file(long_run / name)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert not list(output.glob("*.partial")) and not (output / "result").exists()


def refuse(words: list[str], message: str) -> None:
    """A run that does not begin, in this process."""
    try:
        with pytest.raises(ValueError, match=message):
            train_ar.main(parse_arguments(words))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_checkpoint_of_another_run_is_refused(workshop, long_run, tmp_path):
    words = workshop.options(tmp_path / "run", **LONG_RUN | {"seed": 1})
    refuse([*words, "--resume_from_checkpoint", str(long_run / "checkpoint-28")], "seed is 0 there and 1 here")


def test_a_truncated_checkpoint_is_named(workshop, long_run, tmp_path):
    damaged = tmp_path / "checkpoint-28"
    shutil.copytree(long_run / "checkpoint-28", damaged)
    state = damaged / "training_state_0.pt"
    state.write_bytes(state.read_bytes()[:1000])
    words = workshop.options(tmp_path / "run", **LONG_RUN, resume_from_checkpoint=str(damaged))
    refuse(words, "training_state_0.pt' is damaged, 1000 bytes")


def test_a_folder_that_is_no_checkpoint_is_refused(workshop, tmp_path):
    words = workshop.options(tmp_path / "run", resume_from_checkpoint=str(workshop.folder / "videos"))
    refuse(words, "it is no checkpoint of this script")
