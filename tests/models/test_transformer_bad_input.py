"""Malformed calls of the network, its cache and its scheduler: one ValueError that states the numbers, before a block
has run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_diffusers import KVCache, LongLiveScheduler, LongLiveTransformer3DModel
from tests.support.checks import assert_raises
from tests.support.tiny_pipeline import (
    CHANNELS,
    CHUNK_SIZE,
    SIDE,
    TEXT_DIM,
    TEXT_LENGTH,
    random_inputs,
    teacher_forcing_inputs,
    tiny_cache,
    tiny_transformer,
)


@pytest.fixture(scope="module")
def model() -> LongLiveTransformer3DModel:
    return tiny_transformer()


@pytest.fixture
def runs(model):
    """How many layers ran."""
    ran: list[str] = []
    layers = [model.patch_embedding, model.condition_embedder.text_embedder, *model.blocks]
    hooks = [layer.register_forward_pre_hook(lambda *_: ran.append("layer")) for layer in layers]
    yield ran
    for hook in hooks:
        hook.remove()


# -- forwards --------------------------------------------------------------------------------------------------------


def latents(*shape: int) -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.zeros(shape)}


def text(*shape: int) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": torch.zeros(shape)}


BAD_FORWARDS = {
    "latents of one image": (latents(1, CHANNELS, SIDE, SIDE), ["(1, 8, 4, 4)"]),
    "latents of other channels": (latents(1, 16, 4, SIDE, SIDE), [8, "(1, 16, 4, 4, 4)"]),
    "an odd height": (latents(1, CHANNELS, 4, 5, SIDE), ["5x4", "2x2"]),
    "an odd width": (latents(1, CHANNELS, 4, SIDE, 7), ["4x7", "2x2"]),
    "no height": (latents(1, CHANNELS, 4, 0, SIDE), ["0x4"]),
    "no frames": (latents(1, CHANNELS, 0, SIDE, SIDE), ["0"]),
    "half a chunk": ({**latents(1, CHANNELS, 3, SIDE, SIDE), "timestep": torch.zeros(1)}, [3, CHUNK_SIZE]),
    "a time too few": ({"timestep": torch.zeros(1, 3)}, ["`timestep`", "[1, 4]", "(1, 3)"]),
    "times of another batch": ({"timestep": torch.zeros(3)}, ["`timestep`", "(3,)"]),
    "a time for every token": ({"timestep": torch.zeros(1, 16)}, ["`timestep`", "(1, 16)"]),
    "text of another encoder": (text(1, TEXT_LENGTH, 32), [TEXT_DIM, "(1, 8, 32)"]),
    "text of another batch": (text(2, TEXT_LENGTH, TEXT_DIM), ["(2, 8, 16)"]),
    "flat text": (text(TEXT_LENGTH, TEXT_DIM), ["(8, 16)"]),
    "a text too many": (text(1, 3, TEXT_LENGTH, TEXT_DIM), ["2 chunks", "(1, 3, 8, 16)"]),
    "a text for each frame": (text(1, 4, TEXT_LENGTH, TEXT_DIM), ["2 chunks", "(1, 4, 8, 16)"]),
    "positions of fewer frames": ({"frame_positions": torch.arange(3)}, ["`frame_positions`", "4", "(3,)"]),
    "one position for all frames": ({"frame_positions": torch.zeros(1)}, ["`frame_positions`", "4", "(1,)"]),
    "positions of another batch": ({"frame_positions": torch.zeros(2, 4)}, ["`frame_positions`", "(2, 4)"]),
}


@pytest.mark.parametrize(("wrong", "numbers"), BAD_FORWARDS.values(), ids=BAD_FORWARDS)
@pytest.mark.parametrize(
    "make_inputs", [random_inputs, teacher_forcing_inputs], ids=["block causal", "teacher forcing"]
)
def test_a_forward_refuses(model, runs, make_inputs, wrong, numbers):
    inputs = make_inputs() | wrong
    if "hidden_states" in wrong and "clean_hidden_states" in inputs:
        inputs["clean_hidden_states"] = inputs["hidden_states"]
    assert_raises(lambda: model(**inputs), *numbers)
    assert runs == []


BAD_HISTORIES = {
    "more frames": (
        {"clean_hidden_states": torch.zeros(1, CHANNELS, 6, SIDE, SIDE)},
        ["(1, 8, 6, 4, 4)", "(1, 8, 4, 4, 4)"],
    ),
    "another batch": ({"clean_hidden_states": torch.zeros(2, CHANNELS, 4, SIDE, SIDE)}, ["(2, 8, 4, 4, 4)"]),
    "a time too few": ({"clean_timestep": torch.zeros(1, 3)}, ["`clean_timestep`", "[1, 4]", "(1, 3)"]),
}


@pytest.mark.parametrize(("wrong", "numbers"), BAD_HISTORIES.values(), ids=BAD_HISTORIES)
def test_teacher_forcing_refuses_a_history(model, runs, wrong, numbers):
    assert_raises(lambda: model(**(teacher_forcing_inputs() | wrong)), *numbers)
    assert runs == []


def test_a_clean_time_needs_a_clean_history(model, runs):
    assert_raises(lambda: model(**random_inputs(), clean_timestep=torch.zeros(1)), "`clean_timestep`")
    assert runs == []


# -- streaming forwards ----------------------------------------------------------------------------------------------


def open_cache(model, frames: int = CHUNK_SIZE, **settings):
    cache = tiny_cache(model, **settings)
    cache.begin_chunk(frames)
    return cache


def test_a_stream_needs_an_open_chunk(model, runs):
    assert_raises(lambda: model(**random_inputs(CHUNK_SIZE), kv_cache=tiny_cache(model)), "begin_chunk")
    assert runs == []


@pytest.mark.parametrize("frames", [1, 4])
def test_a_stream_refuses_other_frames_than_its_chunk_has(model, runs, frames):
    assert_raises(lambda: model(**random_inputs(frames), kv_cache=open_cache(model)), frames, CHUNK_SIZE)
    assert runs == []


def test_a_stream_refuses_another_batch(model, runs):
    assert_raises(lambda: model(**random_inputs(CHUNK_SIZE, batch=3), kv_cache=open_cache(model)), 3, 1)
    assert runs == []


def test_a_stream_refuses_another_size(model, runs):
    inputs = random_inputs(CHUNK_SIZE) | latents(1, CHANNELS, CHUNK_SIZE, 6, SIDE)
    assert_raises(lambda: model(**inputs, kv_cache=open_cache(model)), 3, 2)
    assert runs == []


def test_a_stream_refuses_the_cache_of_a_deeper_model(model, runs):
    cache = open_cache(tiny_transformer(num_layers=5))
    assert_raises(lambda: model(**random_inputs(CHUNK_SIZE), kv_cache=cache), 5, 2)
    assert runs == []


@pytest.mark.parametrize("heads", [(3, 12), (2, 24)])
def test_a_stream_refuses_the_cache_of_other_heads(model, runs, heads):
    cache = open_cache(tiny_transformer(num_attention_heads=heads[0], attention_head_dim=heads[1]))
    assert_raises(lambda: model(**random_inputs(CHUNK_SIZE), kv_cache=cache), *heads)
    assert runs == []


def test_a_stream_has_one_text_at_a_time(model, runs):
    inputs = random_inputs(CHUNK_SIZE) | text(1, 1, TEXT_LENGTH, TEXT_DIM)
    assert_raises(lambda: model(**inputs, kv_cache=open_cache(model)), "(1, 1, 8, 16)")
    assert runs == []


def test_a_stream_and_teacher_forcing_exclude_each_other(model, runs):
    inputs = teacher_forcing_inputs(CHUNK_SIZE)
    assert_raises(lambda: model(**inputs, kv_cache=open_cache(model)), "`kv_cache`", "`clean_hidden_states`")
    assert runs == []


def test_a_cache_decides_the_positions(model, runs):
    inputs = random_inputs(CHUNK_SIZE) | {"frame_positions": torch.arange(CHUNK_SIZE)}
    assert_raises(lambda: model(**inputs, kv_cache=open_cache(model)), "`frame_positions`", "`kv_cache`")
    assert runs == []


# -- caches ----------------------------------------------------------------------------------------------------------

BAD_CACHES = {
    "a window too small": ({"window_size": 5}, [5, 6]),
    "no window": ({"window_size": 0}, [0]),
    "half a chunk of sink": ({"sink_size": 3, "window_size": 20}, [3, CHUNK_SIZE]),
    "a negative sink": ({"sink_size": -2}, [-2]),
    "a fractional window": ({"window_size": 6.5}, ["6.5"]),
    "an odd height": ({"height": 5}, ["5x4", "2x2"]),
    "no width": ({"width": 0}, ["4x0"]),
    "no videos": ({"batch_size": 0}, [0]),
    "a negative batch": ({"batch_size": -1}, [-1]),
    "integers": ({"dtype": torch.int8}, ["torch.int8"]),
    "an unknown format": ({"dtype": "int3"}, ["int3"]),
}


@pytest.mark.parametrize(("wrong", "numbers"), BAD_CACHES.values(), ids=BAD_CACHES)
def test_a_cache_is_refused(model, wrong, numbers):
    defaults = {
        "batch_size": 1,
        "height": SIDE,
        "width": SIDE,
        "window_size": 6,
        "sink_size": 2,
        "multi_shot_sink": True,
    }
    assert_raises(lambda: model.create_kv_cache(**(defaults | wrong)), *numbers)


@pytest.mark.parametrize("frames", [0, -1, 3, 100])
def test_a_chunk_has_one_frame_to_chunk_size(model, frames):
    assert_raises(lambda: tiny_cache(model).begin_chunk(frames), frames, CHUNK_SIZE)


@pytest.mark.parametrize("name", ["opens_shot", "rope_offset"])
def test_a_chunk_has_a_setting_for_each_video(model, name):
    cache = tiny_cache(model, batch=2)
    assert_raises(lambda: cache.begin_chunk(CHUNK_SIZE, **{name: [0, 0, 0]}), f"`{name}`", 3, 2)


def test_a_refused_chunk_leaves_the_cache_as_it_was(model):
    cache = tiny_cache(model, batch=2)
    cache.begin_chunk(CHUNK_SIZE)
    before = cache.chunk
    assert_raises(lambda: cache.begin_chunk(3), 3)
    assert_raises(lambda: cache.begin_chunk(CHUNK_SIZE, rope_offset=[0.0]), 1, 2)
    assert cache.chunk is before and cache.num_frames_seen == CHUNK_SIZE


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 8),
    st.integers(0, 10),
    st.booleans(),
    st.booleans(),
    st.lists(st.booleans(), max_size=12),
)
def test_every_cache_that_is_not_refused_works(chunk_size, sink_size, room, multi_shot_sink, relative_rope, cuts):
    """Whatever is cut, a chunk finds its place, the window holds, and sinks stay."""
    sink_size -= sink_size % chunk_size if multi_shot_sink else 0
    pin = min(sink_size, chunk_size) if multi_shot_sink else 0
    window_size = sink_size + pin + chunk_size + room
    cache = KVCache(
        1, 1, 1, 4, 1, 1,
        window_size=window_size, sink_size=sink_size, chunk_size=chunk_size,
        multi_shot_sink=multi_shot_sink, relative_rope=relative_rope,
    )  # fmt: skip
    for number, opens_shot in enumerate([True, *cuts]):
        plan = cache.begin_chunk(chunk_size, opens_shot=opens_shot, rope_offset=8.0)
        held = [frame.index for frame in cache.cached_frames()]
        seen = (number + 1) * chunk_size
        assert len(held) == len(set(held)) == cache.num_cached_frames <= window_size
        assert set(range(min(sink_size, seen))) <= set(held)
        assert set(range(seen - chunk_size, seen)) <= set(held), "the chunk itself"
        slots = plan.slots[0].tolist()
        assert len(set(slots)) == chunk_size and max(slots) < plan.length <= window_size


# -- configuration ---------------------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "tokens of two frames": ({"patch_size": (2, 2, 2)}, ["(2, 2, 2)"]),
    "another normalization": ({"qk_norm": "rms_norm"}, ["'rms_norm'"]),
    "an image model": ({"image_dim": 1280}, [1280]),
    "no chunk": ({"chunk_size": 0}, [0]),
}


@pytest.mark.parametrize(("wrong", "numbers"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_configuration_is_refused(wrong, numbers):
    assert_raises(lambda: tiny_transformer(**wrong), *numbers)


# -- scheduler -------------------------------------------------------------------------------------------------------

BAD_GRIDS = {
    "no steps": ({"num_inference_steps": 0}, [0]),
    "nothing": ({}, ["None"]),
    "negative steps": ({"num_inference_steps": -4}, [-4]),
    "no sigmas": ({"sigmas": []}, ["[]"]),
    "rising sigmas": ({"sigmas": [0.5, 0.9]}, ["0.5, 0.9"]),
    "equal sigmas": ({"sigmas": [0.5, 0.5]}, ["0.5, 0.5"]),
    "a sigma above 1": ({"sigmas": [1.5, 0.5]}, ["1.5"]),
    "a sigma of 0": ({"sigmas": [0.5, 0.0]}, ["0.0"]),
    "a sigma that is no number": ({"sigmas": [float("nan")]}, ["nan"]),
}


@pytest.mark.parametrize(("wrong", "numbers"), BAD_GRIDS.values(), ids=BAD_GRIDS)
def test_a_grid_is_refused(wrong, numbers):
    assert_raises(lambda: LongLiveScheduler().set_timesteps(**wrong), *numbers)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 5), (2, 4, 1), ()])
@pytest.mark.parametrize("name", ["add_noise", "x0"])
def test_noising_refuses_times_of_another_shape(name, shape):
    sample = torch.zeros(2, CHANNELS, 4, SIDE, SIDE)
    call = getattr(LongLiveScheduler(), name)
    assert_raises(lambda: call(sample, sample, torch.zeros(shape)), "[2]", "[2, 4]", str(shape))


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(1, 1000), min_size=1, max_size=8))
def test_every_falling_grid_is_taken(thousandths):
    scheduler = LongLiveScheduler()
    scheduler.set_timesteps(sigmas=[number / 1000 for number in sorted(thousandths, reverse=True)])
    assert len(scheduler.timesteps) == len(thousandths)
    assert (scheduler.sigmas[:-1].diff() < 0).all() and scheduler.sigmas[-1] == 0
