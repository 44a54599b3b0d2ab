"""Streams: the same frames however they are consumed; prompt switches, cuts, and sessions that do not disturb each
other."""

import copy
import gc
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from longlive_diffusers import LongLivePipeline
from tests.support.golden_models import TEXT_LENGTH, golden_pipeline, load_rollout


KEYS = ["<negative>", "The scene transitions. b", "The scene transitions. c", "a", "b", "c"]


@pytest.fixture
def pipe() -> LongLivePipeline:
    return golden_pipeline(KEYS, load_rollout("multi_shot")["embeds"])


def options(seed: int = 0, **changes) -> dict:
    return {
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 2,
        "max_sequence_length": TEXT_LENGTH,
        **changes,
    }


def drain(session) -> torch.Tensor:
    with session:
        return torch.cat([chunk.latents for chunk in session], dim=2)


def values_by_age(cache) -> torch.Tensor:
    """What the last layer holds of each frame, oldest first. Values of a deep layer depend on all that came before."""
    slots = [frame.index for frame in cache._samples[0].slots]
    order = torch.tensor(sorted(range(len(slots)), key=slots.__getitem__))
    _, values = cache[len(cache) - 1].get(len(slots))
    return values.unflatten(1, (len(slots), -1))[:, order]


def test_one_call_a_stream_and_an_asynchronous_stream_give_identical_frames(pipe):
    shots = {"shot_prompts": ["a", "b"], "num_frames": 29}
    whole = pipe(**shots, **options()).frames[0]
    for asynchronous in (False, True):
        with pipe.stream(**shots, async_decode=asynchronous, **options()) as session:
            streamed = np.concatenate([chunk.frames[0] for chunk in session])
        assert whole.shape == (29, 64, 96, 3)
        np.testing.assert_array_equal(streamed, whole)


def test_a_longer_video_begins_like_a_shorter_one(pipe):
    short = pipe("a", num_frames=13, output_type="latent", **options()).frames
    long = pipe("a", num_frames=29, output_type="latent", **options()).frames
    torch.testing.assert_close(long[:, :, :4], short, atol=0, rtol=0)


def test_chunks_say_where_they_are(pipe):
    with pipe.stream(shot_prompts=["a", "b"], chunks_per_shot=[1, 2], num_frames=21, **options()) as session:
        chunks = list(session)
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [chunk.start_frame for chunk in chunks] == [0, 5, 13]
    assert [chunk.shot_index for chunk in chunks] == [0, 1, 1]
    assert [chunk.prompt for chunk in chunks] == ["a", "b", "b"]
    assert [chunk.frames.shape[1] for chunk in chunks] == [5, 8, 8]
    assert all(chunk.latents.shape == (1, 8, 2, 4, 6) for chunk in chunks)


def test_the_number_of_steps_changes_with_the_next_chunk(pipe):
    seen = []

    def on_step_end(pipe, step, timestep, tensors):
        seen.append((step, pipe.num_timesteps))
        return {}

    with pipe.stream("a", num_frames=21, callback_on_step_end=on_step_end, **options()) as session:
        first = next(session).latents
        assert session.num_inference_steps == 2
        session.num_inference_steps = 3
        assert session.num_inference_steps == 3
        second = next(session).latents
        session.num_inference_steps = 1
        next(session)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert [total for _, total in seen] == [6, 6, 8, 8, 8, 6]
    two, three = (drain(pipe.stream("a", num_frames=13, **options(num_inference_steps=steps))) for steps in (2, 3))
    assert torch.equal(first, two[:, :, :2])
    assert not torch.equal(second, two[:, :, 2:]) and not torch.equal(second, three[:, :, 2:])


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, "4", None, True])
def test_a_number_of_steps_that_cannot_be_raises_and_changes_nothing(pipe, steps):
    with pipe.stream("a", num_frames=13, **options()) as session:
        next(session)
        with pytest.raises(ValueError, match="`num_inference_steps` must be"):
            session.num_inference_steps = steps
        assert session.num_inference_steps == 2
        next(session)
    with pytest.raises(ValueError, match="This session is closed"):
        session.num_inference_steps = 4


def test_interleaved_sessions_give_what_each_gives_alone(pipe):
    first, second = options(1), options(2, shot_prompts=["b", "c"], num_frames=21, relative_rope=True)
    alone = [drain(pipe.stream("a", num_frames=29, **first)), drain(pipe.stream(**second))]
    sessions = [pipe.stream("a", num_frames=29, **options(1)), pipe.stream(**{**second, **options(2)})]
    collected: list[list[torch.Tensor]] = [[], []]
    for turn in (0, 1, 1, 0, 0, 1, 0):
        collected[turn].append(next(sessions[turn]).latents)
    for parts, expected in zip(collected, alone, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=2), expected, atol=0, rtol=0)


def test_sessions_advanced_from_two_threads_give_what_each_gives_alone(pipe):
    alone = [drain(pipe.stream("a", num_frames=29, **options(seed))) for seed in (1, 2)]
    results: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        results[seed] = drain(pipe.stream("a", num_frames=29, **options(seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in zip((1, 2), alone, strict=True):
        torch.testing.assert_close(results[seed], expected, atol=0, rtol=0)


def test_a_batch_with_different_shots_equals_its_videos_alone(pipe):
    noise = torch.randn(2, 8, 10, 4, 6, generator=torch.Generator().manual_seed(0))
    shots, durations = [["a", "b"], ["c", "a", "b"]], [[1, 4], [2, 2, 1]]
    keys = [*KEYS, "The scene transitions. a"]
    embeds = load_rollout("multi_shot")["embeds"]
    pipe = golden_pipeline(keys, torch.cat([embeds, embeds[3:4] * 0.5]))
    for relative_rope in (False, True):
        settings = options(output_type="latent", relative_rope=relative_rope)
        together = pipe(shot_prompts=shots, chunks_per_shot=durations, latents=noise, **settings).frames
        for row in range(2):
            alone = pipe(
                shot_prompts=shots[row], chunks_per_shot=durations[row], latents=noise[row : row + 1], **settings
            ).frames
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_relative_rope_depends_on_ranks_alone(pipe):
    """While nothing has been evicted, ranks are frame indices: both ways of counting agree."""
    absolute, relative = (
        pipe("a", num_frames=21, output_type="latent", relative_rope=flag, **options()).frames
        for flag in (False, True)
    )
    torch.testing.assert_close(absolute, relative, atol=1e-6, rtol=0)


def test_a_prompt_switch_rewrites_the_history_under_the_new_prompt(pipe):
    """Afterwards the cache holds what it would hold had the clean latents been fed under the new prompt."""
    for relative_rope in (False, True):
        with pipe.stream("a", relative_rope=relative_rope, **options()) as session:
            latents = [next(session).latents for _ in range(5)]
            session.prompt = "b"
            assert session.prompt == "b"
            chunk = next(session)
            assert (chunk.prompt, chunk.shot_index) == ("b", 0)
            cache = session._denoiser.kv_caches[0]
            held = {frame.index: frame.position for frame in cache.cached_frames()}
            assert sorted(held) == [0, 1, 8, 9, 10, 11]

            expected = pipe.transformer.create_kv_cache(
                1, 4, 6, window_size=6, sink_size=2, multi_shot_sink=True, relative_rope=relative_rope
            )
            text = pipe._embed_prompts(["b"], TEXT_LENGTH)
            all_latents = [*latents, chunk.latents]
            assert held[0] == (6 if relative_rope else 0)  # relative: sinks moved up by the six evicted frames
            with torch.no_grad():
                for index in (0, 3, 4, 5):  # frames 0, 1 and 6..9 were cached when the prompt changed
                    expected.begin_chunk(2, rope_offset=4.0 if index else 0.0)
                    pipe.transformer(all_latents[index], torch.zeros(1), text, kv_cache=expected)
            torch.testing.assert_close(values_by_age(cache), values_by_age(expected), atol=1e-5, rtol=0)


def test_a_switch_changes_only_what_comes_after_it(pipe):
    plain = drain(pipe.stream("a", num_frames=37, **options()))
    with pipe.stream("a", num_frames=37, **options()) as session:
        parts = [next(session).latents for _ in range(3)]
        session.prompt = "b"
        parts += [chunk.latents for chunk in session]
    switched = torch.cat(parts, dim=2)
    torch.testing.assert_close(switched[:, :, :6], plain[:, :, :6], atol=0, rtol=0)
    assert (switched[:, :, 6:] - plain[:, :, 6:]).abs().max() > 1e-3


def test_switching_to_the_same_prompt_changes_nothing(pipe):
    """Recaching under the prompt that history already has rewrites the same keys and values."""
    plain = drain(pipe.stream("a", num_frames=37, sink_size=0, window_size=10, **options()))
    with pipe.stream("a", num_frames=37, sink_size=0, window_size=10, **options()) as session:
        parts = [next(session).latents for _ in range(4)]
        session.prompt = "a"
        parts += [chunk.latents for chunk in session]
    torch.testing.assert_close(torch.cat(parts, dim=2), plain, atol=1e-5, rtol=0)


def test_a_cut_is_what_a_planned_shot_is(pipe):
    planned = drain(pipe.stream(shot_prompts=["a", "b"], chunks_per_shot=[2, 3], num_frames=37, **options()))
    with pipe.stream("a", num_frames=37, **options()) as session:
        parts = [next(session).latents for _ in range(2)]
        session.cut("b")
        chunk = next(session)
        assert (chunk.prompt, chunk.shot_index) == ("b", 1)
        parts += [chunk.latents, *(chunk.latents for chunk in session)]
    torch.testing.assert_close(torch.cat(parts, dim=2), planned, atol=0, rtol=0)


@pytest.mark.parametrize("chunks_seen", [0, 1, 2], ids="after {} chunks".format)
def test_a_continued_video_can_be_cut_at_its_first_new_chunk(pipe, chunks_seen):
    video = torch.randn(1, 8, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    with pipe.stream("a", video_latents=video, num_frames=29, **options()) as session:
        for _ in range(chunks_seen):
            next(session)
        session.cut("b")
        chunks = {chunk.index: (chunk.shot_index, chunk.prompt) for chunk in session}
    assert [chunks[index] for index in (2, 3)] == [(1, "b"), (1, "b")]
    assert all(chunks[index] == (0, "a") for index in range(chunks_seen, 2))


def test_a_prompt_changed_while_the_continued_video_is_read_is_as_good_as_the_first(pipe):
    video = torch.randn(1, 8, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    continued = {"video_latents": video, "num_frames": 29}
    expected = drain(pipe.stream("b", **continued, **options()))
    with pipe.stream("a", **continued, **options()) as session:
        chunks = [next(session)]
        session.prompt = "b"
        chunks += list(session)
    assert [chunk.prompt for chunk in chunks] == ["a", "b", "b", "b"]
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)


def test_a_prompt_set_before_the_first_chunk_simply_replaces_it(pipe):
    expected = drain(pipe.stream("b", num_frames=13, **options()))
    with pipe.stream("a", num_frames=13, **options()) as session:
        session.prompt = "b"
        got = torch.cat([chunk.latents for chunk in session], dim=2)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_each_text_is_encoded_once(pipe):
    pipe.text_encoder.num_encoded = 0
    pipe(shot_prompts=["a", "b", "c"], num_frames=61, output_type="latent", **options())
    assert pipe.text_encoder.num_encoded == 5  # a; b and c, each with and without the scene-cut prefix


def test_an_error_in_the_denoising_thread_reaches_the_consumer(pipe):
    def fail(pipeline, step, timestep, tensors):
        if step == 4:
            raise RuntimeError("callback failed at step 4")
        return tensors

    session = pipe.stream("a", async_decode=True, callback_on_step_end=fail, **options())
    received = [next(session).index, next(session).index]
    with pytest.raises(RuntimeError, match="callback failed at step 4"):
        next(session)
    assert received == [0, 1]
    assert list(session) == []
    assert session.kv_cache_bytes == 0


def test_a_consumer_that_stops_early_leaves_no_cache(pipe):
    with pipe.stream("a", async_decode=True, **options()) as session:
        next(session)
    assert session.kv_cache_bytes == 0
    with pytest.raises(ValueError, match="closed"):
        session.prompt = "b"


def test_a_session_that_is_dropped_makes_no_more_chunks(pipe):
    begun = []
    session = pipe.stream(
        "a", async_decode=True, callback_on_step_end=lambda p, step, t, tensors: begun.append(step), **options()
    )
    caches = weakref.ref(session._denoiser)
    next(session)
    del session
    deadline = time.monotonic() + 10
    while caches() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert caches() is None, "whatever it had in memory is free"
    assert max(begun) // 2 <= 2


def test_a_session_that_cannot_be_copied_leaves_nothing_behind(pipe, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pipe.stream("a", **options()) as session:
        with pytest.raises(TypeError, match="cannot pickle"):
            copy.deepcopy(session)
        gc.collect()
        assert not unraisable
        next(session)


def test_the_sessions_of_a_pipeline_share_one_thread_that_ends_with_it():
    pipe = golden_pipeline(KEYS, load_rollout("multi_shot")["embeds"])
    before = set(threading.enumerate())
    for _ in range(3):
        with pipe.stream("a", async_decode=True, **options()) as session:
            next(session)
    (thread,) = set(threading.enumerate()) - before
    del pipe, session
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_denoising_runs_at_most_the_queue_ahead(pipe):
    """One chunk waits, one is being made: a prompt switch is never more than that away."""
    begun = []
    session = pipe.stream(
        "a", async_decode=True, callback_on_step_end=lambda p, step, t, tensors: begun.append(step), **options()
    )
    with session:
        next(session)
        time.sleep(0.5)
        assert max(begun) // 2 <= 2


def test_interrupt_ends_the_stream_with_the_chunk_in_progress(pipe):
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 2
        return tensors

    chunks = list(pipe.stream("a", callback_on_step_end=stop, **options()))
    assert [chunk.index for chunk in chunks] == [0, 1]


def test_without_a_generator_the_global_seed_decides(pipe):
    settings = {**options(), "generator": None, "num_frames": 13}
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        session = pipe.stream("a", **settings)
        torch.randn(3)  # what else draws from the global state after the session began does not matter
        results.append(drain(session))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)
