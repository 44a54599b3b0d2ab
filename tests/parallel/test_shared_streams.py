"""Streams that two and four ranks share are those of one process. The ranks are started once;
`programs/shared_streams.py` is what they run, and it writes what it found for each case."""

import json

import pytest

from tests.programs.shared_streams import CASES, CHUNK_SIZE, cases_of
from tests.support.paths import PROGRAMS
from tests.support.ranks import run_ranks


EXACT = 2e-5
# Four ranks multiply other shapes than one process, whose last bits differ: a number halfway between two codes of a
# packed cache may then be rounded to the other one, which is a difference of a few percent in that one number.
ONE_CODE = 2e-3
every_number = pytest.mark.parametrize("num_ranks", [2, 4])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, dict[str, dict[str, float]]]:
    """What two and four ranks found, by the names of the cases."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}
    for num_ranks in (2, 4):
        path = folder / f"{num_ranks}.json"
        for status, printed in run_ranks(PROGRAMS / "shared_streams.py", num_ranks, path):
            assert status == 0, printed
        results[num_ranks] = json.loads(path.read_text())
    return results


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_video_of_one(found, name):
    assert found[2][name]["difference"] <= EXACT


@pytest.mark.parametrize("name", [*cases_of(4), "pairs"])
def test_four_ranks_make_the_video_of_one(found, name):
    assert found[4][name]["difference"] <= (ONE_CODE if "fp8" in name else EXACT)


def test_chunks_that_ranks_do_not_divide_are_exact(found):
    assert found[4]["golden multi_shot_wide_sink"]["difference"] == 0


def exchanged(found, num_ranks: int, what: str, network: str) -> dict[str, float]:
    return found[num_ranks][f"exchange of {what}, network in {network}"]


@every_number
@pytest.mark.parametrize("dtype, itemsize", [("torch.float32", 4), ("torch.bfloat16", 2)])
def test_queries_keys_values_and_the_output_are_sent_once(found, num_ranks, dtype, itemsize):
    chunks, forwards, layers, tokens, width = 1, 3, 2, CHUNK_SIZE * 4, 4 * 32
    values = chunks * forwards * layers * 4 * (tokens // num_ranks) * width * (num_ranks - 1) // num_ranks
    plain = exchanged(found, num_ranks, dtype, dtype)
    assert (plain["bytes"], plain["messages"]) == (values * itemsize, 2 * chunks * forwards * layers)
    packed = exchanged(found, num_ranks, "fp8", dtype)
    assert packed["bytes"] == values + 4 * values // 32  # a scale for each token of each head
    assert packed["messages"] == plain["messages"]


@every_number
def test_an_exchange_in_8_bits_rounds_a_little(found, num_ranks):
    assert exchanged(found, num_ranks, "torch.float32", "torch.float32")["error"] < 1e-6
    assert 1e-4 < exchanged(found, num_ranks, "fp8", "torch.float32")["error"] < 0.02


@every_number
def test_the_cache_of_a_rank_is_its_part(found, num_ranks):
    slots, layers = 12, 2
    whole = 2 * layers * slots * 4 * 4 * 32 * 4  # keys and values, tokens, heads, head_dim, float32
    assert exchanged(found, num_ranks, "torch.float32", "torch.float32")["cache"] * num_ranks == whole
