"""Shots become one prompt for every chunk, and prompts become text embeddings, each computed once."""

import pytest
import torch

from longlive_diffusers import Shot, ShotPlan
from longlive_diffusers.pipelines.prompt_source import PromptSource
from longlive_diffusers.pipelines.shots import ChunkPrompt


PREFIX = "Cut. "


def advance(source: PromptSource, index: int):
    """Begin a chunk like a session does."""
    return source.advance(index, source.take_redirection(index))


def plan_of(prompts: list[str], chunks_per_shot=None, num_chunks: int | None = None) -> ShotPlan:
    return ShotPlan.from_prompts(prompts, chunks_per_shot, num_chunks)


def texts(plan: ShotPlan, num_chunks: int, start: int = 0) -> list[str]:
    """What each chunk is conditioned on."""
    return [plan.chunk(index).conditioning(PREFIX) for index in range(start, num_chunks)]


# -- durations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, num_chunks, expected",
    [
        (["a"], 3, "aaa"),
        (["a", "b"], 4, "aabb"),
        (["a", "b"], 5, "aaabb"),
        (["a", "b", "c"], 8, "aaabbbcc"),
        (["a", "b", "c"], 7, "aaabbcc"),
        (["a", "b", "c"], 2, "ab"),
        (["a", "b", "c"], 1, "a"),
    ],
)
def test_chunks_are_spread_evenly_and_the_first_shots_take_the_remainder(prompts, num_chunks, expected):
    plan = plan_of(prompts, num_chunks=num_chunks)
    assert "".join(plan.chunk(index).prompt for index in range(num_chunks)) == expected


@pytest.mark.parametrize(
    "durations, num_chunks, expected",
    [
        ([1, 2, 3], 6, "abbccc"),
        ([3, 1, 1], 5, "aaabc"),
        (2, 6, "aabbcc"),
        (1, 3, "abc"),
        ([4, 4, 4], 6, "aaaabb"),  # longer than the video: cut
        ([9, 1, 1], 3, "aaa"),
        ([1, 1, 1], 6, "abcccc"),  # shorter than the video: the last shot goes on
    ],
)
def test_durations_that_are_given_are_kept(durations, num_chunks, expected):
    plan = plan_of(["a", "b", "c"], durations, num_chunks)
    assert "".join(plan.chunk(index).prompt for index in range(num_chunks)) == expected


def test_an_endless_video_stays_in_its_last_shot():
    plan = plan_of(["a", "b"], [2, 1])
    assert [plan.chunk(index).prompt for index in (0, 1, 2, 3, 10**6)] == ["a", "a", "b", "b", "b"]
    assert plan_of(["a"]).chunk(10**6) == ChunkPrompt("a", shot_index=0, opens_shot=False)


def test_the_last_shot_may_have_no_duration():
    plan = plan_of(["a", "b"], [1, None], 4)
    assert "".join(plan.chunk(index).prompt for index in range(4)) == "abbb"


def test_the_same_prompt_may_be_several_shots():
    chunks = [plan_of(["a", "a"], 2).chunk(index) for index in range(4)]
    assert [chunk.shot_index for chunk in chunks] == [0, 0, 1, 1]
    assert [chunk.opens_shot for chunk in chunks] == [True, False, True, False]


# -- cuts ------------------------------------------------------------------------------------------------------------


def test_the_prefix_is_for_the_first_chunk_of_every_shot_but_the_first():
    plan = plan_of(["a", "b", "c"], [2, 3, 1])
    assert texts(plan, 7) == ["a", "a", "Cut. b", "b", "b", "Cut. c", "c"]


def test_a_chunk_says_whether_its_scene_is_new():
    chunks = [plan_of(["a", "b"], [1, 2]).chunk(index) for index in range(3)]
    assert [(chunk.shot_index, chunk.opens_shot, chunk.cuts) for chunk in chunks] == [
        (0, True, False),
        (1, True, True),
        (1, False, False),
    ]


# -- redirection -----------------------------------------------------------------------------------------------------


def test_a_new_prompt_within_a_shot_replaces_all_that_was_planned():
    plan = plan_of(["a", "b", "c"], 2).redirected(3, "x", cut=False)
    assert plan.chunk(3) == ChunkPrompt("x", shot_index=1, opens_shot=False)
    assert texts(plan, 9, start=3) == ["x"] * 6


def test_a_cut_opens_the_next_shot():
    plan = plan_of(["a", "b", "c"], 2).redirected(3, "x", cut=True)
    assert plan.chunk(3) == ChunkPrompt("x", shot_index=2, opens_shot=True)
    assert texts(plan, 6, start=3) == ["Cut. x", "x", "x"]


def test_redirections_follow_each_other():
    plan = plan_of(["a"]).redirected(2, "x", cut=True).redirected(4, "y", cut=False).redirected(5, "z", cut=True)
    assert plan.chunk(5) == ChunkPrompt("z", shot_index=2, opens_shot=True)
    assert plan.chunk(6) == ChunkPrompt("z", shot_index=2, opens_shot=False)


def test_a_second_redirection_at_the_same_chunk_replaces_the_first():
    plan = plan_of(["a"]).redirected(2, "x", cut=False).redirected(2, "y", cut=False)
    assert plan.chunk(2) == ChunkPrompt("y", shot_index=0, opens_shot=False)


@pytest.mark.parametrize("cut", [False, True])
def test_before_the_first_chunk_there_is_nothing_to_cut_from(cut):
    plan = plan_of(["a", "b"], 2).redirected(0, "x", cut=cut)
    assert plan.chunk(0) == ChunkPrompt("x", shot_index=0, opens_shot=True)
    assert texts(plan, 4) == ["x"] * 4


def test_a_redirection_at_a_planned_cut_stays_in_the_shot_before():
    """Of the shot that was planned there, nothing has been made."""
    plan = plan_of(["a", "b"], 2).redirected(2, "x", cut=False)
    assert plan.chunk(2) == ChunkPrompt("x", shot_index=0, opens_shot=False)


def test_a_plan_is_not_changed_by_redirecting_it():
    plan = plan_of(["a", "b"], 1)
    plan.redirected(1, "x", cut=True)
    assert texts(plan, 2) == ["a", "Cut. b"]


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chunks", [0, -1, 1.5, True, "2"])
def test_a_shot_lasts_a_whole_number_of_chunks(num_chunks):
    with pytest.raises(ValueError, match=f"an integer number of chunks, at least 1, got {num_chunks!r}"):
        Shot("a", num_chunks)


def test_a_shot_needs_a_prompt():
    with pytest.raises(ValueError, match="must be a string, got int"):
        Shot(7, 1)


def test_a_video_needs_a_shot():
    with pytest.raises(ValueError, match="at least one shot, got none"):
        ShotPlan([])


def test_an_endless_video_of_several_shots_needs_durations():
    with pytest.raises(ValueError, match="endless video of 2 shots needs `chunks_per_shot`"):
        plan_of(["a", "b"])


@pytest.mark.parametrize("durations", [[1], [1, 2, 3], "12", 1.5, True, [1, 0], [None, 1]])
def test_durations_that_do_not_match_raise(durations):
    with pytest.raises(
        ValueError, match=r"an integer, or a list of them for 2 shots, got|at least 1, got|no duration, not shot 0"
    ):
        plan_of(["a", "b"], durations, 4)


# -- texts and their embeddings --------------------------------------------------------------------------------------


class Encoder:
    """Embeds a prompt as `[1, 2]` of its number; remembers what it was asked for."""

    def __init__(self):
        self.batches: list[list[str]] = []
        self.numbers: dict[str, float] = {}

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        self.batches.append(list(prompts))
        values = [self.numbers.setdefault(prompt, float(len(self.numbers))) for prompt in prompts]
        return torch.tensor(values)[:, None, None].expand(-1, 1, 2).clone()

    def prompts_of(self, embeds: torch.Tensor) -> list[str]:
        """The prompts that `embeds [rows, L, D]` stand for."""
        return [{number: text for text, number in self.numbers.items()}[row[0, 0].item()] for row in embeds]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def source_of(encoder: Encoder, *plans: ShotPlan, num_chunks: int | None = None) -> PromptSource:
    return PromptSource(
        list(plans),
        encoder,
        negative_embeds=None,
        batch_size=len(plans),
        scene_cut_prefix=PREFIX,
        num_new_chunks=num_chunks,
    )


def test_each_chunk_gets_its_text(encoder):
    source = source_of(encoder, plan_of(["a", "b"], [2, 2]))
    seen = [encoder.prompts_of(advance(source, index)[1]) for index in range(5)]
    assert seen == [["a"], ["a"], ["Cut. b"], ["b"], ["b"]]


def test_the_tensor_is_the_same_for_as_long_as_the_text_is(encoder):
    """By which the network knows that its text keys and values still hold."""
    source = source_of(encoder, plan_of(["a", "b"], [3, 3]))
    embeds = [advance(source, index)[1] for index in range(6)]
    assert embeds[0] is embeds[1] is embeds[2]
    assert embeds[4] is embeds[5]
    assert len({id(tensor) for tensor in embeds}) == 3  # a; b with the prefix; b


def test_every_text_is_encoded_once_and_all_in_one_batch(encoder):
    source = source_of(encoder, plan_of(["a", "b", "a"], 2), plan_of(["b", "a"], 2))
    for index in range(8):
        advance(source, index)
    assert len(encoder.batches) == 1
    assert sorted(encoder.batches[0]) == ["Cut. a", "Cut. b", "a", "b"]


def test_shots_that_the_video_never_reaches_are_not_encoded(encoder):
    source_of(encoder, plan_of(["a", "b", "c"], 2), num_chunks=4)
    assert encoder.batches == [["a", "Cut. b", "b"]]


def test_rows_have_their_own_shots(encoder):
    source = source_of(encoder, plan_of(["a", "b"], [1, 2]), plan_of(["a", "c"], [2, 1]))
    prompts, embeds, switched = advance(source, 1)
    assert [prompt.prompt for prompt in prompts] == ["b", "a"]
    assert encoder.prompts_of(embeds) == ["Cut. b", "a"]
    assert not switched


def test_a_redirection_takes_effect_with_the_next_chunk(encoder):
    source = source_of(encoder, plan_of(["a", "b"], 3))
    advance(source, 0)
    source.redirect("x", cut=False)
    assert source.upcoming() == ["x"]
    prompts, embeds, switched = advance(source, 1)
    assert (prompts[0], encoder.prompts_of(embeds), switched) == (ChunkPrompt("x", 0, False), ["x"], True)
    _, later, switched = advance(source, 2)
    assert later is embeds
    assert not switched, "history is rewritten once"


def test_a_cut_is_no_switch_within_a_shot(encoder):
    """History keeps the prompt that it was made with."""
    source = source_of(encoder, plan_of(["a"]))
    advance(source, 0)
    source.redirect("x", cut=True)
    prompts, embeds, switched = advance(source, 1)
    assert (prompts[0], encoder.prompts_of(embeds), switched) == (ChunkPrompt("x", 1, True), ["Cut. x"], False)
    assert encoder.prompts_of(advance(source, 2)[1]) == ["x"]


def test_a_redirection_before_the_first_chunk_replaces_the_plan(encoder):
    source = source_of(encoder, plan_of(["a", "b"], 1))
    source.redirect("x", cut=False)
    seen = [encoder.prompts_of(advance(source, index)[1]) for index in range(3)]
    assert seen == [["x"], ["x"], ["x"]]


def test_a_redirection_while_a_video_is_read_applies_from_the_start_of_the_new_one(encoder):
    """Chunks of a video that is continued have negative numbers."""
    source = source_of(encoder, plan_of(["a", "b"], 1))
    assert encoder.prompts_of(advance(source, -2)[1]) == ["a"]
    source.redirect("x", cut=False)
    seen = [advance(source, index) for index in (-1, 0, 1)]
    assert [encoder.prompts_of(embeds) for _, embeds, _ in seen] == [["x"], ["x"], ["x"]]


def test_of_two_redirections_the_last_prompt_counts_and_a_cut_stays_one(encoder):
    source = source_of(encoder, plan_of(["a"]))
    advance(source, 0)
    source.redirect("x", cut=True)
    source.redirect("y", cut=False)
    assert advance(source, 1)[0] == [ChunkPrompt("y", 1, True)]


def test_a_redirection_may_name_a_prompt_for_each_row(encoder):
    source = source_of(encoder, plan_of(["a"]), plan_of(["b"]))
    advance(source, 0)
    source.redirect(["x", "y"], cut=False)
    assert encoder.prompts_of(advance(source, 1)[1]) == ["x", "y"]


def test_texts_that_are_not_needed_again_are_forgotten(encoder):
    """An endless stream whose prompt is changed all the time does not collect embeddings."""
    source = source_of(encoder, plan_of(["a", "b"], 2))
    for index in range(20):
        source.redirect(f"prompt {index}", cut=False)
        advance(source, index)
    assert list(source._encoded) == ["prompt 19"]
    assert sum(len(batch) for batch in encoder.batches) == 3 + 20


def test_a_prompt_that_returns_is_encoded_again_only_if_it_was_forgotten(encoder):
    source = source_of(encoder, plan_of(["a"]))
    for index, prompt in enumerate(["a", "x", "x", "a"]):
        source.redirect(prompt, cut=False)
        advance(source, index)
    assert encoder.batches == [["a"], ["x"], ["a"]]


def test_setting_the_prompt_that_there_is_gives_the_same_tensor_but_rewrites_history(encoder):
    source = source_of(encoder, plan_of(["a"]))
    _, before, _ = advance(source, 0)
    source.redirect("a", cut=False)
    _, after, switched = advance(source, 1)
    assert after is before
    assert switched


def test_upcoming_prompts_are_those_of_the_next_chunk(encoder):
    source = source_of(encoder, plan_of(["a", "b"], 1), plan_of(["c"]))
    assert source.upcoming() == ["a", "c"]
    advance(source, 0)
    assert source.upcoming() == ["b", "c"]


def test_replaced_embeddings_serve_until_the_text_changes(encoder):
    """A callback may put its own in place."""
    source = source_of(encoder, plan_of(["a", "b"], 2))
    advance(source, 0)
    own = torch.zeros(1, 1, 2)
    source.replace_embeds(own)
    assert advance(source, 1)[1] is own
    assert encoder.prompts_of(advance(source, 2)[1]) == ["Cut. b"]


def test_embeddings_that_are_given_need_no_prompt_until_one_is_set(encoder):
    fixed = torch.full((1, 1, 2), 7.0)
    source = PromptSource(
        None,
        encoder,
        prompt_embeds=fixed,
        negative_embeds=None,
        batch_size=1,
        scene_cut_prefix=PREFIX,
        num_new_chunks=None,
    )
    assert source.upcoming() == [None]
    for index in range(2):
        prompts, embeds, switched = advance(source, index)
        assert (prompts[0].prompt, embeds is fixed, switched) == (None, True, False)
    assert encoder.batches == []
    source.redirect("x", cut=True)
    prompts, embeds, _ = advance(source, 2)
    assert (prompts[0], encoder.prompts_of(embeds)) == (ChunkPrompt("x", 1, True), ["Cut. x"])


@pytest.mark.parametrize("prompt", [["x"], ["x", "y", "z"], 7, ["x", 7], ("x", "y"), None])
def test_a_redirection_of_another_type_or_number_raises_and_changes_nothing(encoder, prompt):
    source = source_of(encoder, plan_of(["a"]), plan_of(["b"]))
    with pytest.raises(ValueError, match=r"prompts? for a batch of 2 videos|string or a list of 2 strings"):
        source.redirect(prompt, cut=False)
    assert source.upcoming() == ["a", "b"]
