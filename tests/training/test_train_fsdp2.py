"""`train_ar.py` with FSDP2 and Balanced SP on two and four ranks: what a single process computes, in float32 and in
bfloat16, also if all ranks are killed on the way. `programs/train_with_fsdp2.py` says how this runs on a CPU."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.video.reader import read_video
from run.log import read_log
from tests.support.training_run import run_with_fsdp2


SETTINGS = {
    "max_train_steps": 3,
    "ema_start_step": 0,
    "multi_shot_rope_offset": 295,  # a second shot in the middle begins at position 4 + 295
    "validation_steps": 2,
    "validation_num_inference_steps": 1,
}
# In bfloat16, which many CPUs have to emulate, one video.
PROMPTS = {
    "no": ["a red circle moves right", "a blue square | a green cross"],
    "bf16": ["a blue square | a green cross"],
}


@dataclass(frozen=True)
class Kind:
    """A precision and a number of ranks."""

    precision: str
    num_ranks: int

    @property
    def is_float32(self) -> bool:
        return self.precision == "no"

    @property
    def changed(self) -> dict[str, object]:
        """An update is of two clips: accumulated by the two ranks that share each, or one for each of two pairs."""
        changed = {"train_batch_size": 1}
        changed |= dict.fromkeys(("gradient_checkpointing", "activation_offloading"), not self.is_float32)
        return changed | ({"gradient_accumulation_steps": 2} if self.num_ranks == 2 else {})

    def runs(self, workshop, folder: Path) -> list[dict]:
        """On ranks; and, of some kinds, on ranks that are killed, and go on. Those make checkpoints and no videos, the
        others videos and no checkpoints: neither may change an update."""
        ranks, killed = f"{self.num_ranks} ranks", f"{self.num_ranks} ranks killed"
        processes = {"ranks": self.num_ranks, "cp_size": 2}
        begun = self.changed | {"validation_prompts": None, "checkpointing_steps": 1}
        resumed = begun | {"resume_from_checkpoint": "checkpoint-1"}
        whole = run(workshop, folder, self.precision, ranks, self.changed) | processes
        whole["arrivals"] = str(folder / self.precision / ranks)
        if self not in KILLED:
            return [whole]
        return [
            whole,
            run(workshop, folder, self.precision, killed, begun) | processes | {"kill_after": 2},
            run(workshop, folder, self.precision, killed, resumed) | processes,
        ]


def run(workshop, folder: Path, precision: str, name: str, changed: dict[str, object]) -> dict:
    """A run of `train_ar.py` in `<precision>/<name>`, as the program takes it."""
    settings = SETTINGS | {"data_cache_dir": workshop.folder / f"cache of {precision}"}
    settings |= {"validation_prompts": PROMPTS[precision]} | changed
    return {"words": workshop.options(folder / precision / name, **settings), "mixed_precision": precision}


PRECISIONS = tuple(PROMPTS)
# Not all pairs, since a run of ranks takes seconds: float32 tells most closely whether numbers of ranks agree.
KINDS = [Kind("no", 2), Kind("no", 4), Kind("bf16", 2)]
KILLED = [Kind("no", 2)]


def parametrize(kinds: list[Kind]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: f"{kind.num_ranks} ranks, {kind.precision}")


every_kind = parametrize(KINDS)


@pytest.fixture(scope="module")
def folder(workshop, tmp_path_factory) -> Path:
    """The folder of all runs: by precision, `one`, and for each number of ranks `N ranks`; some, `N ranks killed`."""
    folder = tmp_path_factory.mktemp("fsdp2")
    runs = []
    for precision in PRECISIONS:
        (folder / precision).mkdir()
        alone = run(workshop, folder, precision, "one", {}) | {"arrivals": str(folder / precision / "one")}
        kinds = [kind for kind in KINDS if kind.precision == precision]
        runs += [alone, *(several for kind in kinds for several in kind.runs(workshop, folder))]
    run_with_fsdp2(folder, runs)
    return folder


def log(folder: Path) -> list[dict]:
    return read_log(folder / "training_log.jsonl")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def arrivals(folder: Path, name: str) -> list[dict]:
    """What each rank of a run noted."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]


@every_kind
def test_the_updates_are_those_of_one_process(folder, kind):
    """Also after the validation of step 2, which shows the network its averaged weights.

    In bfloat16 but for rounding: one process has float32 weights that autocast rounds for matrix products; FSDP2
    gathers them in bfloat16, so that biases and modulations are rounded too. Each rounding changes a number by up to
    0.2 %. In a loss, which is a mean over thousands of errors, that nearly averages out; less so in a norm of
    gradients.
    """
    ours, theirs = (log(folder / kind.precision / name) for name in (f"{kind.num_ranks} ranks", "one"))
    for name, tolerance in (("loss", 5e-4), ("gradient_norm", 1e-2)):
        tolerance = 1e-5 if kind.is_float32 else tolerance
        assert [entry[name] for entry in ours] == pytest.approx([entry[name] for entry in theirs], rel=tolerance)


@parametrize(KILLED)
def test_ranks_that_were_killed_go_on_as_if_they_had_not_been(folder, kind):
    ours, theirs = (folder / kind.precision / f"{kind.num_ranks} ranks{suffix}" for suffix in (" killed", ""))
    assert log(ours) == log(theirs)
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_kind
def test_the_result_is_the_pipeline_that_one_process_saves(folder, kind, workshop):
    pipe = LongLivePipeline.from_pretrained(folder / kind.precision / f"{kind.num_ranks} ranks")
    found, expected = pipe.transformer.state_dict(), weights(folder / kind.precision / "one")
    assert found.keys() == expected.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    before = weights(workshop.folder / "pipeline")
    moved = torch.cat([(expected[name] - before[name]).flatten() for name in expected])
    error = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    # AdamW divides a gradient by its size: of weights that hardly matter, rounding may decide where they go.
    assert error.norm() < (1e-3 if kind.is_float32 else 0.1) * moved.norm()


@every_kind
def test_timesteps_and_positions_arrive_as_they_were_drawn(folder, kind):
    (one,), ranks = (arrivals(folder / kind.precision, name) for name in ("one", f"{kind.num_ranks} ranks"))
    assert len(ranks) == kind.num_ranks
    for name in ("timestep", "position"):
        assert {value for rank in ranks for value in rank["values"][name]} == set(one["values"][name])
    assert 299.0 in one["values"]["position"]
    timesteps = torch.tensor(one["values"]["timestep"])
    assert not torch.equal(timesteps.bfloat16().float(), timesteps), "bfloat16 would not show"
    for rank in ranks:
        assert rank["dtypes"]["timestep"] == rank["dtypes"]["rotation"] == ["torch.float32"]
        assert rank["dtypes"]["tokens"] == ["torch.float32" if kind.is_float32 else "torch.bfloat16"]


def test_gradients_are_sharded_after_every_accumulated_batch(folder):
    """FSDP2 would keep whole gradients if it were told not to synchronize them."""
    assert all(0.0 not in rank["values"].get("gradient sync", []) for rank in arrivals(folder / "no", "2 ranks"))


@every_kind
def test_validation_shows_what_one_process_shows(folder, kind):
    ours, theirs = (folder / kind.precision / name / "validation" for name in (f"{kind.num_ranks} ranks", "one"))
    names = {f"step-{step}/{index}.mp4" for step in (2, 3) for index in range(len(PROMPTS[kind.precision]))}
    assert {str(path.relative_to(ours)) for path in ours.glob("*/*.mp4")} == names
    for name in names:
        found, expected = (read_video(videos / name)[0] for videos in (ours, theirs))
        difference = np.abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float))
        assert difference.mean() < (0.5 if kind.is_float32 else 5), "of 255"


@every_kind
def test_what_is_cached_is_in_the_precision_of_the_network(folder, kind, workshop):
    expected = "None" if kind.is_float32 else "torch.bfloat16"  # None is that of the weights
    for name in ("one", f"{kind.num_ranks} ranks"):
        assert all(rank["dtypes"]["KV cache"] == [expected] for rank in arrivals(folder / kind.precision, name))
    embeds = [
        load_file(path)["tensor"] for path in workshop.folder.glob(f"cache of {kind.precision}/text/*.safetensors")
    ]
    assert {tensor.dtype for tensor in embeds} == {torch.float32 if kind.is_float32 else torch.bfloat16}
