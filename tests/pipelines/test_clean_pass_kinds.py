"""`clean_pass`: what the history remembers a chunk by, and the forwards that are left out."""

from collections.abc import Callable

import pytest
import torch

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.models.kv_cache import KVCache
from longlive_diffusers.models.transformer_longlive import LongLiveTransformer3DModel
from longlive_diffusers.pipelines.chunk_step import CLEAN_PASSES, Conditioning, chunk_step, write_clean
from tests.support.tiny_pipeline import CHUNK_SIZE, tiny_arguments, tiny_cache, tiny_pipeline, tiny_transformer


CACHE_DTYPES = [None, torch.bfloat16, "fp8", "nvfp4"]
NUM_CHUNKS = 4


@pytest.fixture
def pipe() -> LongLivePipeline:
    return tiny_pipeline(transformer=tiny_transformer(attention_head_dim=16))  # a head that NVFP4 can store


def arguments(**changes) -> dict:
    noise = torch.randn(1, 8, NUM_CHUNKS * CHUNK_SIZE, 4, 4, generator=torch.Generator().manual_seed(3))
    return tiny_arguments(num_frames=29, latents=noise, **changes)


@pytest.fixture
def forwards(monkeypatch) -> list[str]:
    """What runs: "step", "clean", or "clean without text"."""
    happened: list[str] = []
    forward = LongLiveTransformer3DModel.forward

    def noted(model, latents, timestep, text, *others, **options):
        happened.append("step" if timestep.any() else "clean" if text is not None else "clean without text")
        return forward(model, latents, timestep, text, *others, **options)

    monkeypatch.setattr(LongLiveTransformer3DModel, "forward", noted)
    return happened


def by_hand(
    pipe: LongLivePipeline, finish: Callable[[torch.Tensor, torch.Tensor, KVCache], None], dtype=None
) -> torch.Tensor:
    """Make the chunks in two steps each, in plain words. `finish` gets the latents, the embeddings and the cache."""
    embeds, _ = pipe.encode_prompt("a cat runs on the grass", do_classifier_free_guidance=False, max_sequence_length=8)
    cache = tiny_cache(pipe.transformer, num_frames=NUM_CHUNKS * CHUNK_SIZE, dtype=dtype)
    made = []
    with torch.no_grad():
        for noise in arguments()["latents"].split(CHUNK_SIZE, dim=2):
            latents = noise.contiguous()
            cache.begin_chunk(CHUNK_SIZE)
            pipe.scheduler.set_timesteps(2)
            for index, timestep in enumerate(pipe.scheduler.timesteps):
                if index == 1 and finish is by_the_last_step:
                    cache.finish_chunk()
                timesteps = torch.full((1, CHUNK_SIZE), float(timestep))
                velocity = pipe.transformer(latents, timesteps, embeds, kv_cache=cache).sample
                latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            finish(pipe.transformer, latents, embeds, cache)
            made.append(latents)
    return torch.cat(made, dim=2)


def by_the_last_step(transformer, latents, embeds, cache) -> None:
    pass


def without_text(transformer, latents, embeds, cache) -> None:
    cache.finish_chunk()
    transformer(latents, torch.zeros(1, CHUNK_SIZE), None, kv_cache=cache)


def with_text(transformer, latents, embeds, cache) -> None:
    cache.finish_chunk()
    transformer(latents, torch.zeros(1, CHUNK_SIZE), embeds, kv_cache=cache)


BY_HAND = {"full": with_text, "text_free": without_text, "last": by_the_last_step}


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("clean_pass", CLEAN_PASSES)
def test_the_history_is_what_is_said(pipe, clean_pass, dtype):
    expected = by_hand(pipe, BY_HAND[clean_pass], dtype)
    found = pipe(**arguments(clean_pass=clean_pass, kv_cache_dtype=dtype)).frames
    assert distance(found, expected) < 1e-6
    if clean_pass != "full":
        assert distance(pipe(**arguments(kv_cache_dtype=dtype)).frames, expected) > 1e-3


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_the_default_is_the_full_one(pipe):
    assert torch.equal(pipe(**arguments()).frames, pipe(**arguments(clean_pass="full")).frames)


CASES = {
    "plain": ({}, 8, 0),
    "asynchronous": ({"async_decode": True}, 8, 0),
    "one step": ({"num_inference_steps": 1}, 4, 0),
    "guidance": ({"guidance_scale": 3.0}, 16, 0),
    "an image": ({"image_latents": torch.randn(1, 8, 1, 4, 4)}, 8, 0),
    "fp8": ({"kv_cache_dtype": "fp8"}, 8, 0),
    "nvfp4, guidance": ({"kv_cache_dtype": "nvfp4", "guidance_scale": 3.0}, 16, 0),
    "relative RoPE": ({"relative_rope": True, "kv_cache_dtype": "nvfp4"}, 8, 0),
    "a cut": ({"shot_prompts": ["a cat", "a dog"], "prompt": None}, 8, 0),
    # The first two chunks are given: they have no step.
    "a continued video": ({"video_latents": torch.randn(1, 8, 4, 4, 4), "latents": None}, 4, 2),
    "a continued video, fp8": (
        {"video_latents": torch.randn(1, 8, 4, 4, 4), "latents": None, "kv_cache_dtype": "fp8"},
        4,
        2,
    ),
}


@pytest.mark.parametrize(("changes", "steps", "passes"), CASES.values(), ids=CASES)
def test_without_clean_passes_only_given_chunks_have_one(pipe, forwards, changes, steps, passes):
    with pipe.stream(**{**arguments(clean_pass="last"), **changes}) as session:
        chunks = list(session)
    assert len(chunks) == NUM_CHUNKS and all(chunk.latents.isfinite().all() for chunk in chunks)
    assert (forwards.count("step"), forwards.count("clean")) == (steps, passes)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("step", "is_in_place", "passes"), [(3, False, 1), (3, True, 1), (2, False, 0), (2, True, 0), (None, False, 0)]
)
def test_a_callback_that_changes_the_result_has_the_chunk_written_as_it_is_then(
    pipe, forwards, step, is_in_place, passes, dtype
):
    """Of the second chunk, step 3 is the last one."""

    def on_step_end(pipe, index, timestep, tensors):
        if index != step:
            return {}
        if is_in_place:
            tensors["latents"].mul_(0.5)
            return {}
        return {"latents": 0.5 * tensors["latents"]}

    options = arguments(callback_on_step_end=on_step_end, kv_cache_dtype=dtype)
    chunks = pipe(**options, clean_pass="last").frames.split(CHUNK_SIZE, dim=2)
    assert forwards.count("clean") == passes
    if passes:
        # The third chunk sees the second by its clean latents: other ones would make another third chunk.
        forwards.clear()
        options["callback_on_step_end"] = lambda pipe, index, timestep, tensors: (
            {"latents": chunks[index // 2].clone()} if index in (1, 3) else {}
        )
        again = pipe(**options, clean_pass="last").frames.split(CHUNK_SIZE, dim=2)
        assert torch.equal(again[1], chunks[1]) and forwards.count("clean") == 2


def test_guidance_that_a_callback_ends_leaves_the_other_history_complete(pipe, forwards):
    """From the second chunk on, the negative prompt has no last step."""

    def on_step_end(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0 if step == 2 else 3.0
        return {}

    options = arguments(guidance_scale=3.0, callback_on_step_end=on_step_end, kv_cache_dtype="fp8")
    assert pipe(**options, clean_pass="last").frames.isfinite().all()
    assert (forwards.count("step"), forwards.count("clean")) == (15, 1)


@pytest.mark.parametrize(("step", "steps", "passes"), [(2, 3, 1), (3, 4, 0)])
@pytest.mark.parametrize("dtype", [None, "fp8"])
def test_an_interrupted_chunk_is_handed_over(pipe, forwards, step, steps, passes, dtype):
    def interrupt(pipe, index, timestep, tensors):
        pipe._interrupt = index == step

    options = arguments(callback_on_step_end=interrupt, kv_cache_dtype=dtype, clean_pass="last")
    with pipe.stream(**options) as session:
        assert [chunk.index for chunk in session] == [0, 1]
    assert (forwards.count("step"), forwards.count("clean")) == (steps, passes)


def test_a_chunk_step_that_ends_early_leaves_a_chunk_that_is_finished(pipe):
    transformer = pipe.transformer
    cache = tiny_cache(transformer, dtype="fp8")
    conditioning = Conditioning(torch.randn(1, 8, 16), clean_pass="last")
    noise = torch.randn(1, 8, CHUNK_SIZE, 4, 4)
    with torch.no_grad():
        for iterate in (lambda timesteps: timesteps[:1], iter):
            cache.begin_chunk(CHUNK_SIZE)
            chunk_step(
                transformer, pipe.scheduler, noise, [cache], conditioning, num_inference_steps=2, iterate=iterate
            )
            assert cache.chunk.finished


# -- without text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_a_history_without_text_is_the_same_under_every_prompt(pipe, dtype):
    latents, texts = torch.randn(1, 8, CHUNK_SIZE, 4, 4), torch.randn(2, 1, 8, 16)

    def keys(clean_pass: str, text: torch.Tensor) -> torch.Tensor:
        cache = tiny_cache(pipe.transformer, dtype=dtype)
        cache.begin_chunk(CHUNK_SIZE)
        with torch.no_grad():
            write_clean(pipe.transformer, latents, [cache], Conditioning(text, clean_pass=clean_pass))
        return cache[1].get(CHUNK_SIZE)[0]

    assert torch.equal(keys("text_free", texts[0]), keys("text_free", texts[1]))
    assert not torch.equal(keys("full", texts[0]), keys("full", texts[1]))


@pytest.mark.parametrize(("clean_pass", "rewritten"), [("full", 2), ("text_free", 0), ("last", 2)])
@pytest.mark.parametrize("change", ["switch", "blend"])
def test_a_new_prompt_has_history_to_rewrite_only_where_it_carries_one(pipe, forwards, clean_pass, rewritten, change):
    with pipe.stream(**arguments(clean_pass=clean_pass)) as session:
        next(session)
        next(session)
        forwards.clear()
        if change == "switch":
            session.prompt = "a dog"
        else:
            session.blend("a dog", chunks=2)
        chunk = next(session)
    assert chunk.prompt == "a dog"
    own_pass = {"full": ["clean"], "text_free": ["clean without text"], "last": []}[clean_pass]
    assert forwards == ["clean"] * rewritten + ["step", "step"] + own_pass


def test_a_forward_without_text_needs_a_cache(pipe):
    with pytest.raises(ValueError, match="`encoder_hidden_states` may be None only with a `kv_cache`"):
        pipe.transformer(torch.randn(1, 8, CHUNK_SIZE, 4, 4), torch.zeros(1), None)


@pytest.mark.parametrize("value", ["none", "", "Full", None, True, 0, ["last"]])
def test_what_it_cannot_be(pipe, value):
    message = r"`clean_pass` must be one of \('full', 'text_free', 'last'\), got "
    with pytest.raises(ValueError, match=message):
        pipe(**arguments(clean_pass=value))
    with pytest.raises(ValueError, match=message):
        pipe.stream(**arguments(clean_pass=value))
