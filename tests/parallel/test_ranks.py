"""Several gloo ranks compute what one process does. They are started once, with the variables that `accelerate
launch` gives them; `programs/sequence_parallel.py` is what they run, and it writes an error for each case."""

import json
import math

import pytest

from tests.programs.sequence_parallel import CHECKPOINTED, CLIPS
from tests.support.paths import PROGRAMS
from tests.support.processes import run_ranks


NUM_RANKS = 4
CASES = [*CLIPS, *(f"{name}, checkpointed" for name in CHECKPOINTED)]
every_group = pytest.mark.parametrize("group", [2, 4], ids=["2 ranks", "4 ranks"])


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, dict[str, float]]:
    """Relative errors of each case."""
    results = tmp_path_factory.mktemp("ranks") / "errors.json"
    for status, printed in run_ranks(PROGRAMS / "sequence_parallel.py", NUM_RANKS, results, ACCELERATE_USE_CPU="true"):
        assert status == 0, printed
    return json.loads(results.read_text())


@every_group
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_process(errors, group, case):
    found = errors[f"{group} ranks: {case}"]
    assert found.keys() == {"loss", "all gradients", "worst gradient"}
    assert {what: error for what, error in found.items() if not error < 1e-5} == {}


@every_group
def test_the_velocity_is_that_of_one_process(errors, group):
    assert errors[f"{group} ranks: velocity"]["velocity"] < 1e-5


@every_group
def test_the_exchange_is_exact_and_so_is_its_inverse(errors, group):
    assert errors[f"{group} ranks: all-to-all"] == {"scatter": 0, "gather": 0, "gradient": 0}


@every_group
def test_a_clip_without_valid_frames_teaches_nothing(errors, group):
    found = errors[f"{group} ranks: nothing valid"]
    assert found == {"loss": 0, "gradients": 0} and not any(map(math.isnan, found.values()))


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_sequence_parallel_pairs_in_two_data_parallel_replicas(errors, wrapper):
    found = errors[wrapper]
    assert found.keys() == {"loss", "all gradients", "worst gradient"}
    assert {what: error for what, error in found.items() if not error < 1e-5} == {}
