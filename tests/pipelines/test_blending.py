"""Moving from one prompt to another over several chunks: the embeddings on the way, and all that may come between."""

import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.limits import MAX_BLEND_CHUNKS
from longlive_diffusers.pipelines import denoiser
from longlive_diffusers.pipelines.blending import Blend, interpolate
from tests.support.golden_models import TEXT_LENGTH, golden_pipeline, load_rollout


KEYS = ["<negative>", "The scene transitions. b", "The scene transitions. c", "a", "b", "c"]


@pytest.fixture
def pipe() -> LongLivePipeline:
    return golden_pipeline(KEYS, load_rollout("multi_shot")["embeds"])


def embeds_of(key: str) -> torch.Tensor:
    """The embeddings of a prompt, `[1, L, D]`, in which random tokens stand for a real text encoder's."""
    index = KEYS.index(key)
    return load_rollout("multi_shot")["embeds"][index : index + 1]


def options(seed: int = 0, **changes) -> dict:
    return {
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 2,
        "max_sequence_length": TEXT_LENGTH,
        "output_type": "latent",
        **changes,
    }


class Streamed:
    """A stream, with the embeddings that its chunks were made with, and whether their history was rewritten."""

    def __init__(self, pipe: LongLivePipeline, monkeypatch, prompt="a", **arguments):
        self.embeds, self.rewritten, self.prompts, self.latents = [], [], [], []
        self.recached: list[torch.Tensor] = []

        def note(pipe, step, timestep, tensors):
            if step % 2 == 0:
                self.embeds.append(tensors["prompt_embeds"])
                self.rewritten.append(len(self.recached))
                self.recached.clear()

        original = denoiser.rewrite_history

        def noted(transformer, cache, latents, conditioning):
            self.recached.append(conditioning.prompt_embeds)
            original(transformer, cache, latents, conditioning)

        monkeypatch.setattr(denoiser, "rewrite_history", noted)
        arguments = {
            "callback_on_step_end": note,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            **arguments,
        }
        self.session = pipe.stream(prompt, **options(**arguments))

    def chunks(self, count: int = 1) -> "Streamed":
        for _ in range(count):
            chunk = next(self.session)
            self.prompts.append(chunk.prompt)
            self.latents.append(chunk.latents)
        return self


def assert_mixed(found: list[torch.Tensor], start: torch.Tensor, end: torch.Tensor, weights: list[float]) -> None:
    """Embeddings in that order; at weight 1 those of the end, to the bit."""
    assert len(found) == len(weights)
    for embeds, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(embeds, start + weight * (end - start), atol=1e-6, rtol=0)
        if weight == 1:
            assert torch.equal(embeds, end)


# -- embeddings ------------------------------------------------------------------------------------------------------

A, B = torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 2, 0])
HALF = 2**0.5
INTERPOLATED = {
    "linear": (A, B, 0.25, "linear", [1.5, 0.5, 0]),
    "an arc": (A, B, 0.5, "spherical", [HALF, HALF, 0]),
    "a third of an arc": (A, B, 1 / 3, "spherical", [3**0.5, 1, 0]),
    "an arc between lengths": (A, 2 * B, 0.5, "spherical", [HALF, 2 * HALF, 0]),
    "out of zeros": (0 * A, B, 0.25, "spherical", [0, 0.5, 0]),
    "into zeros": (A, 0 * B, 0.25, "spherical", [1.5, 0, 0]),
    "zeros": (0 * A, 0 * B, 0.25, "spherical", [0, 0, 0]),
    "parallel": (A, 3 * A, 0.5, "spherical", [4, 0, 0]),
    "opposite": (A, -A, 0.25, "spherical", [1, 0, 0]),
    "nearly parallel": (A, A + 0.01 * B, 0.5, "spherical", [2, 0.01, 0]),
    "the beginning": (A, B, 0.0, "spherical", [2, 0, 0]),
    "the end": (A, B, 1.0, "spherical", [0, 2, 0]),
}


@pytest.mark.parametrize(("start", "end", "weight", "way", "expected"), INTERPOLATED.values(), ids=INTERPOLATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_on_its_way(start, end, weight, way, expected, dtype):
    found = interpolate(start.to(dtype), end.to(dtype), weight, way)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.float(), torch.tensor(expected, dtype=torch.float32), atol=tolerance, rtol=0)


def test_every_token_goes_its_own_way():
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    end[0, 2] = 0
    for way in ("linear", "spherical"):
        whole = interpolate(start, end, 0.3, way)
        for place in itertools.product(range(2), range(5)):
            assert torch.equal(whole[place], interpolate(start[place], end[place], 0.3, way))


def test_an_arc_is_even_and_does_not_get_shorter():
    vectors = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    start, end = vectors / vectors.norm(dim=-1, keepdim=True)
    points = [interpolate(start, end, weight / 8, "spherical") for weight in range(9)]
    steps = [torch.linalg.norm(b - a, dim=-1) for a, b in itertools.pairwise(points)]
    for point, step in zip(points, steps, strict=False):
        torch.testing.assert_close(point.norm(dim=-1), torch.ones(7))
        torch.testing.assert_close(step, steps[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("start_length", "end_length"), [(3, 5), (5, 3), (4, 4)])
def test_prompts_of_different_lengths_are_filled_up_with_zeros(start_length, end_length):
    start, end = torch.ones(1, start_length, 2), 3 * torch.ones(1, end_length, 2)
    blend = Blend(start, end, 2, "linear")
    found = blend.next()
    assert found.shape == (1, max(start_length, end_length), 2)
    expected = [((i < start_length) + 3 * (i < end_length)) / 2 for i in range(found.shape[1])]
    assert found[0, :, 0].tolist() == expected
    assert not blend.is_over and blend.next() is end and blend.is_over


# -- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_embeddings_move_in_even_steps_and_arrive(pipe, monkeypatch, chunks, asynchronous):
    """With each step, history is rewritten under the same embeddings."""
    streamed = Streamed(pipe, monkeypatch, async_decode=asynchronous)
    with streamed.session as session:
        streamed.chunks(2)
        session.blend("b", chunks)
        assert session.prompt == "b"
        streamed.chunks(chunks + 4)
        assert session.prompt == "b"
    first = streamed.prompts.index("b")  # asynchronous: it comes a little later
    assert first == 2 or asynchronous
    ahead = len(streamed.embeds)
    on_the_way = [step / chunks for step in range(1, chunks + 1)]
    weights = [0.0] * first + on_the_way + [1.0] * (ahead - first - chunks)
    assert_mixed(streamed.embeds, embeds_of("a"), embeds_of("b"), weights)
    assert streamed.rewritten == [0] * first + [1] * chunks + [0] * (ahead - first - chunks)
    assert streamed.prompts == ["a"] * first + ["b"] * (chunks + 6 - first)
    assert all(embeds is streamed.embeds[-1] for embeds in streamed.embeds[first + chunks :]), "cached keys stay valid"


def test_a_blend_of_one_chunk_is_a_switch(pipe):
    def latents(change) -> torch.Tensor:
        with pipe.stream("a", num_frames=45, **options()) as session:
            parts = [next(session).latents for _ in range(3)]
            change(session)
            return torch.cat([*parts, *(chunk.latents for chunk in session)], dim=2)

    switched = latents(lambda session: setattr(session, "prompt", "b"))
    for way in ("linear", "spherical"):
        assert torch.equal(latents(lambda session, way=way: session.blend("b", chunks=1, interpolation=way)), switched)
    assert not torch.equal(latents(lambda session: session.blend("b", chunks=2)), switched)


def test_a_blend_to_the_same_prompt_changes_nothing(pipe):
    wide = {"sink_size": 0, "window_size": 10}
    with pipe.stream("a", num_frames=37, **options(**wide)) as session:
        plain = torch.cat([chunk.latents for chunk in session], dim=2)
    with pipe.stream("a", num_frames=37, **options(**wide)) as session:
        parts = [next(session).latents]
        session.blend("a", 3, interpolation="spherical")
        parts += [chunk.latents for chunk in session]
    torch.testing.assert_close(torch.cat(parts, dim=2), plain, atol=1e-5, rtol=0)


def test_a_blend_before_the_first_chunk_begins_at_the_first_prompt(pipe, monkeypatch):
    streamed = Streamed(pipe, monkeypatch)
    with streamed.session as session:
        session.blend("b", 2)
        streamed.chunks(3)
    assert_mixed(streamed.embeds, embeds_of("a"), embeds_of("b"), [0.5, 1, 1])
    assert streamed.prompts == ["b"] * 3


REPLACEMENTS = {
    "a switch": lambda session: setattr(session, "prompt", "c"),
    "a cut": lambda session: session.cut("c"),
    "a blend of one chunk": lambda session: session.blend("c", 1),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
@pytest.mark.parametrize("seen", [0, 1, 3], ids="after {} of its chunks".format)
def test_a_blend_under_way_is_replaced(pipe, monkeypatch, replace, seen):
    streamed = Streamed(pipe, monkeypatch)
    with streamed.session as session:
        streamed.chunks()
        session.blend("b", 4)
        streamed.chunks(seen)
        replace(session)
        streamed.chunks(3)
    assert_mixed(streamed.embeds[:-3], embeds_of("a"), embeds_of("b"), [0, 0.25, 0.5, 0.75][: seen + 1])
    is_cut = replace is REPLACEMENTS["a cut"]
    opening = embeds_of("The scene transitions. c" if is_cut else "c")
    assert torch.equal(streamed.embeds[-3], opening)
    assert all(torch.equal(embeds, embeds_of("c")) for embeds in streamed.embeds[-2:])
    assert streamed.rewritten[-3:] == [0 if is_cut else 1, 0, 0]
    assert streamed.prompts[-3:] == ["c"] * 3


@pytest.mark.parametrize("seen", [1, 2, 3, 5])
def test_another_blend_begins_from_what_is_shown_by_then(pipe, monkeypatch, seen):
    streamed = Streamed(pipe, monkeypatch)
    with streamed.session as session:
        streamed.chunks()
        session.blend("b", 3)
        streamed.chunks(seen)
        session.blend("c", 2)
        streamed.chunks(3)
    assert_mixed(streamed.embeds[-3:], streamed.embeds[-4], embeds_of("c"), [0.5, 1, 1])
    assert streamed.rewritten[-3:] == [1, 1, 0]


def test_of_two_blends_before_one_chunk_the_last_counts(pipe, monkeypatch):
    streamed = Streamed(pipe, monkeypatch)
    with streamed.session as session:
        streamed.chunks()
        session.blend("c", 5)
        session.blend("b", 2)
        streamed.chunks(2)
    assert_mixed(streamed.embeds, embeds_of("a"), embeds_of("b"), [0, 0.5, 1])


def test_a_cut_that_is_still_to_come_stays_a_cut(pipe, monkeypatch):
    streamed = Streamed(pipe, monkeypatch)
    with streamed.session as session:
        streamed.chunks()
        session.cut("b")
        session.blend("c", 3)
        streamed.chunks(2)
    assert torch.equal(streamed.embeds[1], embeds_of("The scene transitions. c"))
    assert torch.equal(streamed.embeds[2], embeds_of("c"))


@pytest.mark.parametrize("planned", [True, False])
def test_after_a_cut_it_begins_from_the_prompt_without_the_words_that_cut(pipe, monkeypatch, planned):
    """The chunk of the cut says that the scene changes; what is mixed with its words would say so again."""
    shots = {"prompt": None, "shot_prompts": ["a", "b", "c"], "chunks_per_shot": [1, 1, 1]} if planned else {}
    streamed = Streamed(pipe, monkeypatch, **shots)
    with streamed.session as session:
        streamed.chunks()
        if not planned:
            session.cut("b")
        streamed.chunks()
        assert torch.equal(streamed.embeds[-1], embeds_of("The scene transitions. b"))
        session.blend("a", 2)
        streamed.chunks(3)
    assert_mixed(streamed.embeds[2:], embeds_of("b"), embeds_of("a"), [0.5, 1, 1])
    assert streamed.prompts[2:] == ["a"] * 3, "it replaces what was planned"


def test_a_batch_takes_a_prompt_for_each_video(pipe, monkeypatch):
    streamed = Streamed(pipe, monkeypatch, prompt=["a", "b"])
    with streamed.session as session:
        streamed.chunks()
        session.blend(["c", "b"], 2)
        assert session.prompt == ["c", "b"]
        streamed.chunks(2)
        session.blend("a", 2)
        streamed.chunks(2)
    start, end = (torch.cat([embeds_of(key) for key in keys]) for keys in ("ab", "cb"))
    assert_mixed(streamed.embeds[:3], start, end, [0, 0.5, 1])
    assert_mixed(streamed.embeds[3:], end, torch.cat([embeds_of("a")] * 2), [0.5, 1])


def test_a_batch_of_which_one_video_was_just_cut(pipe, monkeypatch):
    shots = {"prompt": None, "shot_prompts": [["a", "b"], ["a", "c"]], "chunks_per_shot": [[1, 4], [2, 3]]}
    streamed = Streamed(pipe, monkeypatch, **shots)
    with streamed.session as session:
        streamed.chunks(2)
        session.blend("c", 2)
        streamed.chunks(2)
    start = torch.cat([embeds_of("b"), embeds_of("a")])
    assert_mixed(streamed.embeds[2:], start, torch.cat([embeds_of("c")] * 2), [0.5, 1])


def test_the_negative_prompt_stays(pipe, monkeypatch):
    arguments = {"guidance_scale": 3.0, "negative_prompt": "<negative>"}
    streamed = Streamed(pipe, monkeypatch, **arguments)
    with streamed.session as session:
        streamed.chunks(2)
        negative = session._denoiser.prompts.negative_embeds
        session.blend("b", 2)
        streamed.chunks(3)
        assert session._denoiser.prompts.negative_embeds is negative
    assert streamed.rewritten == [0, 0, 1, 1, 0], "the cache of the prompt alone"
    assert_mixed(streamed.embeds, embeds_of("a"), embeds_of("b"), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("length", [2, TEXT_LENGTH, TEXT_LENGTH + 3])
def test_it_begins_from_embeddings_that_were_given(pipe, monkeypatch, length):
    given = torch.randn(1, length, embeds_of("a").shape[-1], generator=torch.Generator().manual_seed(3))
    streamed = Streamed(pipe, monkeypatch, prompt=None, prompt_embeds=given)
    with streamed.session as session:
        streamed.chunks()
        session.blend("b", 2)
        streamed.chunks(2)
    longest = max(length, TEXT_LENGTH)
    start, end = (torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (given, embeds_of("b")))
    assert torch.equal(streamed.embeds[0], given)
    torch.testing.assert_close(streamed.embeds[1], (start + end) / 2)
    assert torch.equal(streamed.embeds[2], embeds_of("b"))
    assert streamed.prompts == [None, "b", "b"]


def test_it_begins_from_embeddings_that_a_callback_put_in_place(pipe):
    """They hold until the text changes; and a callback may change those on the way."""
    other, seen = torch.randn(embeds_of("a").shape, generator=torch.Generator().manual_seed(3)), []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["prompt_embeds"])
        return {"prompt_embeds": other} if step == 0 else {}

    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pipe.stream("a", **options(**arguments)) as session:
        next(session)
        session.blend("b", 2)
        next(session), next(session)
    assert_mixed(seen[2::2], other, embeds_of("b"), [0.5, 1])


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_a_continued_video_blends_in_its_new_frames(pipe, monkeypatch, seen):
    video = torch.randn(1, 8, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    streamed = Streamed(pipe, monkeypatch, video_latents=video)
    with streamed.session as session:
        streamed.chunks(seen)
        session.blend("b", 2)
        streamed.chunks(5 - seen)
    assert streamed.prompts == ["a", "a", "b", "b", "b"]
    assert_mixed(streamed.embeds, embeds_of("a"), embeds_of("b"), [0.5, 1, 1])


def test_adapters_and_steps_may_change_on_the_way(pipe):
    """The stream with a blend is made of the embeddings of each chunk alone, whatever else changes."""
    torch.manual_seed(5)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))

    def latents(change) -> torch.Tensor:
        pipe.transformer.set_adapters(["default"], [1.0])
        with pipe.stream("a", num_frames=29, **options()) as session:
            parts = [next(session).latents]
            session.blend("b", 2)
            parts.append(next(session).latents)
            change(session)
            return torch.cat([*parts, *(chunk.latents for chunk in session)], dim=2)

    plain, scaled = latents(lambda _: None), latents(lambda _: pipe.transformer.set_adapters(["default"], [0.3]))
    longer = latents(lambda session: setattr(session, "num_inference_steps", 3))
    for changed in (scaled, longer):
        assert torch.equal(changed[:, :, :4], plain[:, :, :4])
        assert (changed[:, :, 4:] - plain[:, :, 4:]).abs().max() > 1e-4


def test_a_blend_that_comes_too_late_is_told_of(pipe, caplog):
    with pipe.stream("a", num_frames=13, **options()) as session:
        next(session), next(session)
        session.blend("b", 3)
        assert list(session) == []
    assert "The video ended before its prompt could change" in caplog.text


# -- what is refused -------------------------------------------------------------------------------------------------

BAD = {
    "no chunks": (("b", 0), {}, r"`chunks` must be an integer from 1 to 16, got 0"),
    "fewer": (("b", -1), {}, r"`chunks` must be an integer from 1 to 16, got -1"),
    "too many": (("b", MAX_BLEND_CHUNKS + 1), {}, r"`chunks` must be an integer from 1 to 16, got 17"),
    "half a chunk": (("b", 1.5), {}, r"`chunks` must be an integer from 1 to 16, got 1\.5"),
    "true": (("b", True), {}, r"`chunks` must be an integer from 1 to 16, got True"),
    "text": (("b", "4"), {}, r"`chunks` must be an integer from 1 to 16, got '4'"),
    "none": (("b", None), {}, r"`chunks` must be an integer from 1 to 16, got None"),
    "another way": (
        ("b",),
        {"interpolation": "cubic"},
        r"`interpolation` must be one of .*'spherical'.*, got 'cubic'",
    ),
    "no way": (("b",), {"interpolation": None}, r"`interpolation` must be one of .*, got None"),
    "no prompt": ((None,), {}, r"A prompt must be a string or a list of 1 strings, got None"),
    "a number": ((3,), {}, r"A prompt must be a string or a list of 1 strings, got 3"),
    "too many prompts": ((["a", "b"],), {}, r"Got 2 prompts for a batch of 1 video"),
    "none of a list": (([],), {}, r"Got 0 prompts for a batch of 1 video"),
}


@pytest.mark.parametrize(("arguments", "keywords", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_and_changes_nothing(pipe, monkeypatch, arguments, keywords, message):
    streamed = Streamed(pipe, monkeypatch)
    with streamed.session as session:
        streamed.chunks()
        session.blend("b", 2)
        with pytest.raises(ValueError, match=message):
            session.blend(*arguments, **keywords)
        streamed.chunks(2)
    assert_mixed(streamed.embeds, embeds_of("a"), embeds_of("b"), [0, 0.5, 1])


@pytest.mark.parametrize("chunks", [MAX_BLEND_CHUNKS, np.int64(2)])
def test_what_can_be_is_taken(pipe, chunks):
    with pipe.stream("a", **options()) as session:
        session.blend("b", chunks)
        next(session)


def test_a_closed_session_does_not_blend(pipe):
    session = pipe.stream("a", **options())
    session.close()
    with pytest.raises(ValueError, match="This session is closed"):
        session.blend("b")


@pytest.mark.parametrize("made", [1, 2, 3])
def test_a_switch_to_the_prompt_of_a_blend_ends_the_blend(pipe, monkeypatch, made):
    """Also where nothing is left of it but the last chunk."""
    streamed = Streamed(pipe, monkeypatch).chunks(1)
    streamed.session.blend("b", 3)
    streamed.chunks(made)
    streamed.session.prompt = "b"
    streamed.chunks(2)
    assert torch.equal(streamed.embeds[-1], embeds_of("b")) and torch.equal(streamed.embeds[-2], embeds_of("b"))
    assert streamed.prompts[-2:] == ["b", "b"]
    assert streamed.recached == [] or torch.equal(streamed.recached[-1], embeds_of("b"))


def test_a_switch_to_the_present_prompt_takes_back_a_callbacks_embeddings(pipe, monkeypatch):
    streamed = Streamed(pipe, monkeypatch)
    note, other = streamed.session._denoiser._callback, embeds_of("c")

    def change(step, timestep, tensors):
        note(step, timestep, tensors)
        return {"prompt_embeds": other} if step == 1 else {}

    streamed.session._denoiser._callback = change
    streamed.chunks(2)
    assert torch.equal(streamed.embeds[1], other)
    streamed.session.prompt = "a"
    streamed.chunks(1)
    assert torch.equal(streamed.embeds[2], embeds_of("a"))
