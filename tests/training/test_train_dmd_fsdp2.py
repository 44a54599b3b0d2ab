"""`train_dmd.py` with FSDP2 and Balanced SP on two and four ranks: what a single process computes, in float32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from run.log import read_log
from tests.support.distillation_run import DistillationWorkshop
from tests.support.training_run import run_with_fsdp2


LORA = "pytorch_lora_weights.safetensors"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SETTINGS = {"train_batch_size": 4, "ema_decay": 0.9}
KINDS = {
    "one": {},
    "two ranks share": {"ranks": 2, "cp_size": 2, "gradient_checkpointing": True},
    "four ranks, two share": {"ranks": 4, "cp_size": 2, "train_batch_size": 2, "gradient_checkpointing": True},
}
TWO = {"ranks": 2, "train_batch_size": 2}  # of which each has rows of its own
KILLED = "two ranks killed"
ALL_WEIGHTS = {
    "gradient_checkpointing": True,
    "train_all_weights": True,
    "rank": None,
    "learning_rate": 1e-4,
    "critic_learning_rate": 1e-4,
}


def run(studio: DistillationWorkshop, folder: Path, name: str, *, ranks=1, cp_size=1, kill_after=None, **changed):
    words = studio.options(folder / name, **SETTINGS | changed)
    settings = {"words": words, "ranks": ranks, "cp_size": cp_size, "kill_after": kill_after, "script": "train_dmd"}
    return settings


@pytest.fixture(scope="module")
def folder(studio, tmp_path_factory) -> Path:
    """The folder of all runs, by name."""
    folder = tmp_path_factory.mktemp("dmd_fsdp2")
    runs = [run(studio, folder, name, **kind) for name, kind in KINDS.items()]
    killed = KINDS["two ranks share"] | {"resume_from_checkpoint": "latest", "checkpointing_steps": 1}
    runs += [run(studio, folder, KILLED, **killed, kill_after=2), run(studio, folder, KILLED, **killed)]
    runs += [run(studio, folder, "all weights, one", **ALL_WEIGHTS)]
    runs += [run(studio, folder, "all weights, two ranks", **TWO | ALL_WEIGHTS)]
    run_with_fsdp2(folder, runs)
    return folder


def log(folder: Path) -> list[dict]:
    return read_log(folder / "training_log.jsonl")


@pytest.mark.parametrize("name", [name for name in KINDS if name != "one"] + ["all weights, two ranks"])
def test_the_updates_and_the_result_are_those_of_one_process(folder, name):
    one = "all weights, one" if name.startswith("all") else "one"
    ours, theirs = log(folder / name), log(folder / one)
    assert len(ours) == len(theirs) == 3
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, rel=2e-5)
    file = WEIGHTS if name.startswith("all") else LORA
    found, expected = load_file(folder / name / file), load_file(folder / one / file)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5)


def test_ranks_that_were_killed_go_on_as_if_they_had_not_been(folder):
    assert log(folder / KILLED) == log(folder / "two ranks share")
    found, expected = load_file(folder / KILLED / LORA), load_file(folder / "two ranks share" / LORA)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
