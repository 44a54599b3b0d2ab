"""Ranks that share a stream: when one fails, ends early or does something else, none hangs, and each knows why.

`programs/failing_ranks.py` runs all cases, each in processes of its own, and is started once."""

import json

import pytest

from tests.programs import failing_ranks
from tests.programs.failing_ranks import CASES, ENDS, LIMIT
from tests.support.processes import run_program


LATENTS = 29.0171  # the sum of the latents of the program's short video
BUG = "LookupError: a bug of the user's"
NO_MEMORY = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
ORDER = "all ranks begin, advance and close their sessions in the same order."
IMPOSSIBLE = "ValueError: `num_frames` must be an integer of at least 1, got -1."
KILLED = [name for name in CASES if name.startswith("kill -9")]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    """What each rank did in each case."""
    path = tmp_path_factory.mktemp("ranks") / "results.json"
    run_program(failing_ranks, path)
    return json.loads(path.read_text())


def failing_rank(case: str) -> int:
    return int(case.split("of rank ")[1][0])


def errors(ranks: list[dict]) -> list[str | None]:
    return [rank["error"] for rank in ranks]


def parted(why: str) -> str:
    return f"RanksParted: The video ends: {why.removesuffix('.')}."


@pytest.mark.parametrize("case", CASES)
def test_no_rank_hangs(results, case):
    assert "hangs" not in [rank["exit"] for rank in results[case]]
    assert all(rank["seconds"] < LIMIT for rank in results[case] if "seconds" in rank)


@pytest.mark.parametrize("case", KILLED)
def test_a_rank_that_was_killed_is_named(results, case):
    killed = failing_rank(case)
    assert results[case][killed] == {"exit": -9}
    for rank in results[case][:killed] + results[case][killed + 1 :]:
        assert rank["exit"] == 1
        assert rank["error"].startswith(f"RanksParted: The video ends: rank {killed} has ended")
        assert rank["error"].count("rank ") == 1


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("error")])
def test_a_rank_that_fails_has_its_own_error_and_the_others_name_it(results, case):
    failing = failing_rank(case)
    for index, rank in enumerate(results[case]):
        assert rank["exit"] == 1
        assert rank["error"] == (BUG if index == failing else parted(f"rank {failing} failed with {BUG}"))


def test_ctrl_c_between_two_chunks_is_an_end_and_within_one_a_failure(results):
    for suffix in ("", ", asynchronous"):
        assert errors(results[f"Ctrl-C in the loop of rank 0 of 2{suffix}"]) == ["KeyboardInterrupt: ", None]
    within = errors(results["Ctrl-C in a chunk of rank 0 of 2"])
    assert within == ["KeyboardInterrupt: ", parted("rank 0 failed with KeyboardInterrupt")]


def test_memory_that_one_rank_lacks(results):
    found = errors(results["rank 1 of 2 encodes an image without memory"])
    assert found == [parted(f"rank 1 failed with {NO_MEMORY}"), NO_MEMORY]
    found = errors(results["the text encoder of rank 0 of 2 fails later"])
    assert found == [NO_MEMORY, parted(f"rank 0 failed with {NO_MEMORY}")]


def test_an_error_whose_text_is_no_unicode(results):
    first, second = errors(results["rank 1 of 2 reads a file of no text"])
    assert second == "OSError: cannot read 'im\udce4ge.png'"
    assert first == parted(r"rank 1 failed with OSError: cannot read 'im\udce4ge.png'")


def test_a_process_that_ends_with_a_session_open(results):
    first, second = results["rank 0 of 2 ends with a session open"]
    assert first == {"exit": 0} and second["error"] == parted("rank 0 has ended, without a word")


@pytest.mark.parametrize("case", [*KILLED, *(name for name in CASES if name.startswith("error"))])
def test_after_a_failure_no_other_video_begins(results, case):
    for rank in results[case]:
        if "error" in rank:
            again, shared_again = rank["afterwards"]
            assert again.startswith("RanksParted: The ranks of this stream have parted: ")
            assert again.endswith(". Start them all again.")
            assert shared_again.startswith("RanksParted: ") and shared_again.endswith(" Start all ranks again.")


@pytest.mark.parametrize("size", [2, 3])
def test_the_first_rank_ends_streams_early_and_the_next_begins_anew(results, size):
    ends = [*ENDS, *ENDS] if size == 2 else ["thread", "close", "drop"]
    for rank in results[f"rank 0 of {size} ends early"]:
        assert rank["error"] is None and rank["said"] == [*ends, LATENTS]


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("rank 1 of 2 ends early")])
def test_another_rank_that_leaves_works_on_until_the_first_has_its_video(results, case):
    first, second = results[case]
    assert first["error"] is None and first["said"] == [0, 1, 2, 3, LATENTS]
    assert second["error"] is None and second["said"] == [0, LATENTS]


@pytest.mark.parametrize("refusing", [0, 1])
def test_what_one_rank_refuses_all_refuse_and_the_next_video_is_made(results, refusing):
    for index, rank in enumerate(results[f"rank {refusing} of 3 asks for the impossible"]):
        own, others = IMPOSSIBLE, f"ValueError: Rank {refusing} refuses: {IMPOSSIBLE}"
        assert rank["said"] == [own if index == refusing else others, LATENTS]


@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("another size", "`latent_shape` is (1, 8, 2, 4, 4) and (1, 8, 2, 8, 4)."),
        ("other steps", "`num_inference_steps` is 2 and 4."),
        ("another decoder", "`decoder` is 'the VAE' and 'a tiny decoder'."),
    ],
)
def test_ranks_that_ask_for_different_videos(results, what, difference):
    for rank in results[f"rank 1 of 2 asks for {what}"]:
        message = f"ValueError: Ranks 0 and 1 do not ask for the same video: {difference}"
        assert rank["said"] == [message, LATENTS]


@pytest.mark.parametrize(("what", "error"), [("fails", BUG), ("has no memory", NO_MEMORY)])
def test_a_text_encoder_that_fails_leaves_the_ranks_together(results, what, error):
    first, second = results[f"the text encoder of rank 0 of 2 {what}"]
    assert first["said"] == [error, LATENTS]
    assert second["said"] == [f"ValueError: Rank 0 refuses: {error}", LATENTS]


def test_synchronous_sessions_are_made_in_turn(results):
    first, second = results["two sessions of 2 ranks in turn"]
    assert first["error"] is None and first["said"] == second["said"] and len(first["said"]) == 4
    assert all(one != other for one, other in first["said"])  # they have different prompts


@pytest.mark.parametrize("case", ["sessions of 2 ranks in another order", "rank 0 of 2 makes another video meanwhile"])
def test_ranks_that_go_on_with_different_sessions(results, case):
    first, second = errors(results[case])
    assert second.startswith("ValueError: Rank 0 is busy with its session number ") and second.endswith(ORDER)
    assert first == parted(f"rank 1 failed with {second}")


@pytest.mark.parametrize("case", [name for name in CASES if "beside" in name])
def test_nothing_is_made_beside_an_asynchronous_session(results, case):
    for rank in results[case]:
        refusal, made = rank["said"]
        assert refusal.startswith("ValueError: ") and "open" in refusal and made == LATENTS
