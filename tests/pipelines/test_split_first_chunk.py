"""The first chunk of a stream in parts: the same frames, the first of them sooner."""

import numpy as np
import pytest
import torch

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.models.transformer_longlive import LongLiveTransformer3DModel
from longlive_diffusers.pipelines.pipeline_output import VideoChunk
from longlive_diffusers.serve.metrics import Metrics
from tests.support.tiny_decoder import small_decoder
from tests.support.tiny_pipeline import CHANNELS, tiny_arguments, tiny_pipeline


@pytest.fixture
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


def stream(pipe: LongLivePipeline, **changes) -> list[VideoChunk]:
    with pipe.stream(**tiny_arguments(**{"num_frames": 21, "output_type": "np", **changes})) as session:
        return list(session)


CASES = {
    "floats": {},
    "bytes": {"output_type": "uint8"},
    "tensors": {"output_type": "pt"},
    "a batch": {"prompt": ["a cat", "a dog"]},
    "asynchronous": {"async_decode": True},
    "an image": {"image_latents": torch.randn(1, CHANNELS, 1, 4, 4)},
    "a continued video": {"video_latents": torch.randn(1, CHANNELS, 2, 4, 4)},
    "a tiny decoder": {"decoder": small_decoder()},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_its_parts_are_the_chunk(pipe, changes):
    whole, parts = stream(pipe, **changes), stream(pipe, split_first_chunk=True, **changes)
    assert [(chunk.index, chunk.part, chunk.num_parts) for chunk in parts] == [
        (0, 0, 2),
        (0, 1, 2),
        (1, 0, 1),
        (2, 0, 1),
    ]
    assert [chunk.start_frame for chunk in parts] == [0, 1, 5, 13]
    assert [chunk.is_complete for chunk in parts] == [False, True, True, True]
    assert [len(chunk.frames[0]) for chunk in parts] == [1, 4, 8, 8]
    for found, expected in (map(joined, (parts, whole)), map(joined_latents, (parts, whole))):
        assert found.shape == expected.shape and np.abs(found - 1.0 * expected).max() < 1e-6
    assert [chunk.prompt for chunk in parts[1:]] == [chunk.prompt for chunk in whole]
    assert parts[0].prompt == whole[0].prompt


def joined(chunks: list[VideoChunk]) -> np.ndarray:
    return np.concatenate([np.asarray(chunk.frames) for chunk in chunks], axis=1)


def joined_latents(chunks: list[VideoChunk]) -> np.ndarray:
    return torch.cat([chunk.latents for chunk in chunks], dim=2).numpy()


def test_chunks_are_whole_without_it(pipe):
    assert all((chunk.part, chunk.num_parts, chunk.is_complete) == (0, 1, True) for chunk in stream(pipe))


def test_latents_alone_are_not_divided(pipe):
    assert [chunk.num_parts for chunk in stream(pipe, split_first_chunk=True, output_type="latent")] == [1, 1, 1]


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """One is appended for each clean pass."""
    forward, counted = LongLiveTransformer3DModel.forward, []

    def noted(model, latents, timestep, *others, **options):
        if not timestep.any():
            counted.append(1)
        return forward(model, latents, timestep, *others, **options)

    monkeypatch.setattr(LongLiveTransformer3DModel, "forward", noted)
    return counted


def test_the_first_frame_does_not_wait_for_the_clean_pass(pipe, passes):
    """It has run when the chunk is complete, after which LoRAs may be changed."""
    seen = []
    with pipe.stream(**tiny_arguments(num_frames=None, output_type="np", split_first_chunk=True)) as session:
        for _ in range(4):
            next(session)
            seen.append(len(passes))
    assert seen == [0, 1, 2, 3]


def test_where_models_take_turns_the_network_is_fetched_once(pipe, passes, monkeypatch):
    monkeypatch.setattr(LongLivePipeline, "is_offloaded", property(lambda _: True))
    with pipe.stream(**tiny_arguments(output_type="np", split_first_chunk=True)) as session:
        next(session)
        assert len(passes) == 1


def test_a_prompt_that_is_set_in_between_is_that_of_the_next_chunk(pipe):
    with pipe.stream(**tiny_arguments(num_frames=None, output_type="np", split_first_chunk=True)) as session:
        first = next(session)
        session.prompt = "a dog"
        assert [next(session).prompt for _ in range(2)] == [first.prompt, "a dog"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("end", ["close", "interrupt"])
def test_it_ends_in_between(pipe, asynchronous, end):
    """Closed, it ends at once; interrupted, with the chunk in progress."""
    session = pipe.stream(
        **tiny_arguments(num_frames=None, output_type="np", split_first_chunk=True, async_decode=asynchronous)
    )
    next(session)
    session.close() if end == "close" else session.interrupt()
    rest = [(chunk.index, chunk.part) for chunk in session]
    assert rest == [] if end == "close" else rest[:1] == [(0, 1)]
    assert session.kv_cache_bytes == 0


def test_times_are_those_of_one_chunk(pipe):
    parts = stream(pipe, split_first_chunk=True)
    assert parts[0].denoise_seconds > 0 and parts[1].denoise_seconds == 0
    assert all(chunk.decode_seconds > 0 for chunk in parts)


def test_a_server_counts_it_as_one_chunk(pipe):
    metrics = Metrics()
    for chunk in stream(pipe, split_first_chunk=True):
        metrics.count_chunk(chunk)
    text = metrics.as_text({})
    assert "longlive_chunks_total 3\n" in text and "longlive_frames_total 21\n" in text
    assert "longlive_denoise_seconds_count 3\n" in text and "longlive_decode_seconds_count 2\n" in text


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_what_it_cannot_be(pipe, value):
    with pytest.raises(ValueError, match="`split_first_chunk` must be True or False, got "):
        pipe.stream(**tiny_arguments(split_first_chunk=value))
