"""Prompts that do not reach the video, wholly or in part: warnings name them."""

import pytest

from longlive_diffusers import LongLivePipeline
from tests.support.checks import logged_by
from tests.support.tiny_pipeline import TEXT_LENGTH, tiny_arguments, tiny_pipeline


@pytest.fixture(scope="module")
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


def warnings_of(pipe, **overrides) -> list[str]:
    with logged_by("longlive_diffusers") as messages:
        pipe.stream(**tiny_arguments(**{"prompt": None, **overrides})).close()
    return messages


# -- no room ---------------------------------------------------------------------------------------------------------

# In a video of 2 chunks.
LEFT_OUT = {
    "more shots than chunks": ({"shot_prompts": ["a", "b", "c", "d"]}, ["2 of 4 prompts", "2 chunks", "'c', 'd'"]),
    "a first shot that takes it all": (
        {"shot_prompts": ["a", "b"], "chunks_per_shot": [9, 1]},
        ["1 of 2 prompts", "2 chunks", "'b'"],
    ),
    "shots of one chunk": ({"shot_prompts": ["a", "b", "c"], "chunks_per_shot": 1}, ["1 of 3 prompts", "'c'"]),
    "one video of a batch": (
        {"shot_prompts": [["a", "b"], ["c", "d", "e"]], "chunks_per_shot": 1},
        ["1 of 3 prompts", "'e'"],
    ),
    "a long prompt": ({"shot_prompts": ["a", "b", "x" * 500]}, ["1 of 3 prompts", "x" * 60 + "..."]),
    "a prompt that is there already": ({"shot_prompts": ["a", "b", "a"]}, ["1 of 3 prompts", "'a'"]),
}


@pytest.mark.parametrize(("overrides", "parts"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_prompts_that_find_no_room_are_named(pipe, overrides, parts):
    (message,) = warnings_of(pipe, **overrides)
    assert all(part in message for part in parts), message


def test_room_is_that_of_the_new_chunks_where_a_video_is_continued(pipe):
    video = pipe(**tiny_arguments(num_frames=5)).frames
    arguments = {"shot_prompts": ["a", "b"], "video_latents": video}
    (message,) = warnings_of(pipe, **arguments)
    assert "a video of 1 chunk:" in message and "'b'" in message
    assert warnings_of(pipe, **arguments, num_frames=21) == []


@pytest.mark.parametrize(
    "overrides",
    [
        {"shot_prompts": ["a", "b"]},
        {"shot_prompts": ["a"], "chunks_per_shot": 9},
        {"shot_prompts": ["a", "b", "c"], "chunks_per_shot": [1, 1, 1], "num_frames": None},
        {"prompt": ["a", "b", "c"]},
    ],
    ids=str,
)
def test_nothing_is_said_where_all_find_room(pipe, overrides):
    assert warnings_of(pipe, **overrides) == []


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_prompt_that_comes_after_the_last_chunk_is_named(pipe, cut, asynchronous):
    with (
        logged_by("longlive_diffusers") as messages,
        pipe.stream(**tiny_arguments(), async_decode=asynchronous) as session,
    ):
        for chunk in session:
            if chunk.index == 1 and cut:
                session.cut("a dog")
            elif chunk.index == 1:
                session.prompt = "a dog"
    (message,) = messages
    assert "'a dog' came after its last chunk" in message


def test_nothing_is_said_of_a_prompt_that_came_in_time_or_where_the_consumer_left(pipe):
    with logged_by("longlive_diffusers") as messages:
        with pipe.stream(**tiny_arguments()) as session:
            next(session)
            session.prompt = "a dog"
            list(session)
        with pipe.stream(**tiny_arguments(num_frames=None)) as session:
            next(session)
            session.prompt = "a dog"
    assert messages == []


# -- texts that condition nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shots", "durations", "num_frames", "expected"),
    [
        (["a", "b"], None, 13, {"a", "The scene transitions. b"}),  # one chunk each
        (["a", "b"], [1, 1], 21, {"a", "The scene transitions. b", "b"}),  # the last goes on
        (["a", "b", "c"], [1, 2, 1], 21, {"a", "The scene transitions. b", "b"}),
        (["a", "b"], [2, 9], 21, {"a", "The scene transitions. b"}),  # cut to one chunk
        (["a", "b"], [1, 1], None, {"a", "The scene transitions. b", "b"}),
    ],
)
def test_only_texts_that_condition_a_chunk_are_encoded(pipe, monkeypatch, shots, durations, num_frames, expected):
    encoded, embed = [], pipe._embed_prompts
    monkeypatch.setattr(
        pipe, "_embed_prompts", lambda prompts, length: encoded.extend(prompts) or embed(prompts, length)
    )
    arguments = {"prompt": None, "shot_prompts": shots, "chunks_per_shot": durations, "num_frames": num_frames}
    pipe.stream(**tiny_arguments(**arguments)).close()
    assert sorted(encoded) == sorted(expected)


# -- longer than the encoder takes -----------------------------------------------------------------------------------

WORDS = ["a", "cat", "runs", "on", "the", "grass"]


def test_a_prompt_that_is_cut_is_named_with_the_place(pipe):
    prompt = " ".join(WORDS * 4)
    with logged_by("longlive_diffusers") as messages:
        embeds, _ = pipe.encode_prompt([prompt, "a cat"], do_classifier_free_guidance=False, max_sequence_length=6)
    (message,) = messages
    kept, rest = message.split("it ends with ")[1].split(" is left out")[0].split(", and ")
    assert "is cut to 6" in message
    assert prompt.startswith(kept.strip("'")) and kept.strip("'")
    assert f"{kept} {rest}".replace("'", "").startswith(prompt[:40])
    expected, _ = pipe.encode_prompt(kept.strip("'"), do_classifier_free_guidance=False, max_sequence_length=6)
    assert (embeds[0] == expected[0]).all(), "what is kept is what the message says"


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_prompt_that_just_fits_is_not_cut(pipe, extra):
    length = len(pipe.tokenizer("a cat runs").input_ids) + extra
    with logged_by("longlive_diffusers") as messages:
        pipe.encode_prompt("a cat runs", do_classifier_free_guidance=False, max_sequence_length=length)
    assert len(messages) == (extra < 0)


@pytest.mark.parametrize("where", ["prompt", "negative prompt", "shot", "switch", "tokenizer's own limit"])
def test_every_prompt_is_looked_at(pipe, monkeypatch, where):
    long = " ".join(WORDS * 4)
    arguments = {"prompt": "a cat"}
    if where == "prompt":
        arguments = {"prompt": ["a cat", long]}
    elif where == "negative prompt":
        arguments |= {"negative_prompt": long, "guidance_scale": 2.0}
    elif where == "shot":
        arguments = {"prompt": None, "shot_prompts": ["a cat", long], "chunks_per_shot": 1}
    elif where == "tokenizer's own limit":
        monkeypatch.setattr(pipe.tokenizer, "model_max_length", TEXT_LENGTH)
        arguments = {"prompt": long, "max_sequence_length": 512}
    with logged_by("longlive_diffusers") as messages, pipe.stream(**tiny_arguments(**arguments)) as session:
        if where == "switch":
            session.prompt = long
        next(session)
    assert len(messages) == 1 and f"is cut to {TEXT_LENGTH}" in messages[0]


@pytest.mark.parametrize(
    ("relative_rope", "num_frames", "warned"),
    [(None, None, True), (True, 13, True), (None, 13, False), (False, None, False)],
)
def test_a_distance_between_shots_that_has_no_effect_is_named(pipe, relative_rope, num_frames, warned):
    options = {"relative_rope": relative_rope, "num_frames": num_frames, "multi_shot_rope_offset": 4.0}
    told = warnings_of(pipe, prompt="a cat", **options)
    assert ["`multi_shot_rope_offset` 4.0 has no effect" in message for message in told] == [True] * warned
