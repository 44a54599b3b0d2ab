"""Streams that two and four ranks share are those of one process. The ranks are started once;
`programs/shared_streams.py` is what they run, and it writes what it found for each case."""

import json

import pytest

from tests.programs.shared_streams import CHUNK_SIZE, cases_of
from tests.support.paths import PROGRAMS
from tests.support.processes import run_ranks


EXACT = 2e-5
# Four ranks multiply other shapes than one process, whose last bits differ: a number halfway between two codes of a
# packed cache may then be rounded to the other one, which is a difference of some percent in that one number, and next
# to nothing in all of them: storing them in 4 bits changes a forward by percents.
FEW_CODES = 5e-4  # a share of the video's norm
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


@pytest.mark.parametrize("name", cases_of(2))
def test_two_ranks_make_the_video_of_one(found, name):
    assert found[2][name]["difference"] <= EXACT


@pytest.mark.parametrize("name", [*cases_of(4), "pairs"])
def test_four_ranks_make_the_video_of_one(found, name):
    if "nvfp4 cache" in name:
        assert found[4][name]["error"] <= FEW_CODES
    else:
        assert found[4][name]["difference"] <= EXACT


def test_chunks_that_ranks_do_not_divide_are_exact(found):
    assert found[4]["golden multi_shot_wide_sink"]["difference"] == 0


def exchanged(found, num_ranks: int, what: str, network: str) -> dict[str, float]:
    return found[num_ranks][f"exchange of {what}, network in {network}"]


FORWARDS, LAYERS, HEADS, HEAD_DIM, FRAME_TOKENS = 3, 2, 4, 32, 4  # of the chunk whose bytes are counted
ROW = HEAD_DIM + 4  # bytes of a token of a head in FP8, with its scale


def sent(num_ranks: int, what_a_rank_has: int) -> int:
    """A rank keeps its own part of what it has."""
    return what_a_rank_has * (num_ranks - 1) // num_ranks


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "itemsize"), [(2, "torch.float32", 4), (2, "torch.bfloat16", 2), (4, "torch.float32", 4)]
)
def test_queries_keys_values_and_the_output_are_sent_once(found, num_ranks, dtype, itemsize):
    rows = FORWARDS * LAYERS * HEADS * FRAME_TOKENS * CHUNK_SIZE // num_ranks
    plain = exchanged(found, num_ranks, dtype, dtype)
    assert plain["bytes"] == sent(num_ranks, 4 * rows * HEAD_DIM * itemsize)
    assert plain["messages"] == 2 * FORWARDS * LAYERS
    packed = exchanged(found, num_ranks, "fp8", dtype)
    assert packed["bytes"] == sent(num_ranks, 4 * rows * ROW)
    assert packed["messages"] == plain["messages"]


@every_number
def test_keys_and_values_of_the_clean_pass_are_sent_in_4_bits(found, num_ranks):
    frames = LAYERS * HEADS * CHUNK_SIZE // num_ranks
    in_fp8 = 4 * (FORWARDS - 1) + 2  # queries, keys, values, outputs; in the clean pass, queries and outputs
    stored = FRAME_TOKENS * HEAD_DIM * 9 // 16 + 4  # codes, scales of blocks, and the frame's largest number
    mean_of_keys = 4 * HEAD_DIM
    whole = frames * (in_fp8 * FRAME_TOKENS * ROW + 2 * stored + mean_of_keys)
    assert exchanged(found, num_ranks, "nvfp4", "torch.float32")["bytes"] == sent(num_ranks, whole)


@pytest.mark.parametrize("exchange", [None, "nvfp4"])
def test_the_first_layer_stores_what_one_process_stores(found, exchange):
    assert found[2][f"codes sent as {exchange}"]["differing"] == 0


@every_number
@pytest.mark.parametrize("exchange", ["fp8", "nvfp4"])
def test_an_exchange_in_few_bits_rounds_a_little(found, num_ranks, exchange):
    assert exchanged(found, num_ranks, "torch.float32", "torch.float32")["error"] < 1e-6
    assert 1e-4 < exchanged(found, num_ranks, exchange, "torch.float32")["error"] < 0.02


@every_number
def test_the_cache_of_a_rank_is_its_part(found, num_ranks):
    whole = 2 * LAYERS * 12 * FRAME_TOKENS * HEADS * HEAD_DIM * 4  # keys and values in 12 slots, float32
    assert exchanged(found, num_ranks, "torch.float32", "torch.float32")["cache"] * num_ranks == whole
