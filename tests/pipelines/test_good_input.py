"""The neighbors of bad input: what is nearly wrong is taken, and the border between the two is where it should be."""

import re

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.models.kv_cache import check_window
from tests.support.checks import assert_raises, logged_by
from tests.support.tiny_pipeline import CHUNK_SIZE, tiny_arguments, tiny_pipeline


IMAGE = PIL.Image.new("RGB", (64, 64))


def latents(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.fixture(scope="module")
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


GOOD_CALLS = {
    "a negative prompt each": {"prompt": ["a", "b"], "negative_prompt": ["x", "y"], "guidance_scale": 2.0},
    "durations of each shot": {"prompt": None, "shot_prompts": ["a", "b"], "chunks_per_shot": [1, 2]},
    "durations of each video": {"prompt": None, "shot_prompts": [["a", "b"], ["c"]], "chunks_per_shot": [[1, 1], [2]]},
    "more shots than chunks": {"prompt": None, "shot_prompts": ["a", "b", "c", "d"]},
    "one noise for all prompts": {"prompt": ["a", "b"], "latents": latents(1, 8, 2, 4, 4), "generator": None},
    "one image for all prompts": {"prompt": ["a", "b"], "image": IMAGE, "generator": None},
    "a size that divides": {"height": 96, "width": 32},
    "the size that latents have": {"latents": latents(1, 8, 2, 4, 6), "height": 64, "width": 96},
    "one frame more than the video": {"video_latents": latents(1, 8, 2, 4, 4), "num_frames": 13},
    "the smallest window": {"window_size": 6, "sink_size": 2},
    "the smallest window without a pin": {"window_size": 4, "sink_size": 2, "multi_shot_sink": False},
    "the smallest window of all": {"window_size": 2, "sink_size": 0, "multi_shot_sink": False},
    "any sink without a pin": {"window_size": 5, "sink_size": 3, "multi_shot_sink": False, "num_frames": 45},
    "a generator for each video": {"prompt": ["a", "b"], "generator": [torch.Generator(), torch.Generator()]},
    "one step": {"num_inference_steps": 1},
    "a cache in half precision": {"kv_cache_dtype": torch.bfloat16},
    "whole numbers for real ones": {"guidance_scale": 2, "multi_shot_rope_offset": 0},
    "NumPy's numbers": {"height": np.int64(32), "num_frames": np.int32(13), "guidance_scale": np.float32(2)},
}


@pytest.mark.parametrize("overrides", GOOD_CALLS.values(), ids=GOOD_CALLS)
def test_a_call_takes(pipe, overrides):
    frames = pipe(**tiny_arguments(**overrides)).frames
    assert frames.shape[2] % CHUNK_SIZE == 0 and torch.isfinite(frames).all()


anything = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@anything
@given(st.integers(-1000, 1000), st.sampled_from(["height", "width"]))
def test_sizes_are_positive_multiples_of_32(pipe, size, side):
    arguments = tiny_arguments(**{side: size})
    if size > 0 and size % 32 == 0:
        pipe.stream(**arguments).close()
    else:
        assert_raises(lambda: pipe.stream(**arguments), side, "32", str(size))


@anything
@given(st.integers(1, 5000))
def test_frames_are_rounded_up_to_whole_chunks_and_a_warning_names_the_number(pipe, num_frames):
    with logged_by("longlive_diffusers") as messages, pipe.stream(**tiny_arguments(num_frames=num_frames)) as session:
        chunks = session._denoiser.request.num_chunks
    used = 1 + 4 * (CHUNK_SIZE * chunks - 1)
    assert 0 <= used - num_frames < 4 * CHUNK_SIZE
    assert len(messages) == (used != num_frames)
    assert all(re.search(rf"\b{num_frames}\b.*\b{used}\b", message) for message in messages)


@anything
@given(st.lists(st.integers(0, 9), min_size=0, max_size=6))
def test_latents_are_whole_chunks_of_the_networks_channels(pipe, shape):
    is_good = len(shape) == 5 and shape[1] == 8 and shape[2] > 0 and shape[2] % 2 == 0 and shape[0] == 1
    is_good = is_good and all(side > 0 and side % 2 == 0 for side in shape[3:])
    arguments = tiny_arguments(latents=torch.zeros(shape))
    if is_good:
        pipe.stream(**arguments).close()
    else:
        assert_raises(lambda: pipe.stream(**arguments))


@anything
@given(st.integers(-1, 14), st.integers(-1, 8), st.integers(0, 4), st.booleans())
def test_a_window_is_refused_exactly_if_a_chunk_may_not_fit(window_size, sink_size, chunk_size, multi_shot_sink):
    pin = min(sink_size, chunk_size) if multi_shot_sink else 0
    is_good = chunk_size >= 1 and window_size >= 1 and sink_size >= 0
    is_good = is_good and not (multi_shot_sink and sink_size % chunk_size)
    is_good = is_good and window_size >= sink_size + pin + chunk_size
    if is_good:
        check_window(window_size, sink_size, chunk_size, multi_shot_sink)
    else:
        assert_raises(lambda: check_window(window_size, sink_size, chunk_size, multi_shot_sink), str(sink_size))


def test_prompts_are_no_longer_than_the_tokenizer_allows(pipe):
    options = {"do_classifier_free_guidance": False}
    assert pipe.encode_prompt("a", **options)[0].shape[1] == 512
    limited = tiny_pipeline()
    limited.tokenizer.model_max_length = 5
    assert limited.encode_prompt("a", **options)[0].shape[1] == 5
    assert limited.encode_prompt("a", **options | {"max_sequence_length": 3})[0].shape[1] == 3
