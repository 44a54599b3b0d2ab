"""Video without end: nothing grows, and nothing is lost, however long a stream goes on.

The reference's table of 1024 time positions ends every video there; these streams go on beyond it.
"""

import gc
import time

import pytest
import torch

from longlive_diffusers import StreamingSession
from tests.support.held_memory import held_bytes
from tests.support.tiny_pipeline import CHUNK_SIZE, tiny_arguments, tiny_pipeline, tiny_transformer


NUM_CHUNKS, WARM_UP = 520, 50
MEGABYTE = 2**20
LARGE = {"height": 256, "width": 256}  # 16 KB of latents for each chunk: 8 MB, were those of 470 chunks kept


def endless_stream(**options) -> StreamingSession:
    """A stream of the smallest network, a single solver step for each chunk."""
    pipe = tiny_pipeline(transformer=tiny_transformer(num_layers=1))
    return pipe.stream(**{**tiny_arguments(num_inference_steps=1), "num_frames": None, **options})


def memory_and_tensors() -> tuple[int, int]:
    """The memory that the process holds, and how many tensors Python knows."""
    memory = held_bytes()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return memory, tensors


def assert_flat(first: tuple[int, int], last: tuple[int, int], seconds: list[float]) -> None:
    early, late = (1000 * sum(part) / len(part) for part in (seconds[WARM_UP : 2 * WARM_UP], seconds[-WARM_UP:]))
    print(
        f"memory {first[0] / MEGABYTE:.1f} MB after {WARM_UP} chunks, {last[0] / MEGABYTE:.1f} MB after "
        f"{len(seconds)}; tensors {first[1]}, {last[1]}; {early:.2f} ms for a chunk at first, {late:.2f} in the end"
    )
    assert last[0] - first[0] < 4 * MEGABYTE
    assert last[1] - first[1] < 20


def consume_in_flat_memory(session: StreamingSession, num_chunks: int, each=lambda session, chunk: None) -> None:
    """Take chunks and drop them."""
    seconds = []
    for number in range(num_chunks):
        begun = time.perf_counter()
        chunk = next(session)
        seconds.append(time.perf_counter() - begun)
        assert chunk.index == number
        assert torch.isfinite(chunk.latents).all()
        each(session, chunk)
        if number == WARM_UP:
            first = memory_and_tensors()
    assert_flat(first, memory_and_tensors(), seconds)


def test_memory_stays_flat_past_1024_latent_frames():
    with endless_stream(**LARGE) as session:
        consume_in_flat_memory(session, NUM_CHUNKS)
        assert NUM_CHUNKS * CHUNK_SIZE > 1024
        cache = session._denoiser.kv_caches[0]
        assert cache.num_frames_seen == NUM_CHUNKS * CHUNK_SIZE
        assert [frame.index for frame in cache.cached_frames()] == [0, 1, 1036, 1037, 1038, 1039]
        assert sorted(session._denoiser._clean_latents) == [0, 518, 519], "of what is cached, for a prompt switch"


def test_memory_stays_flat_while_prompts_change_and_scenes_are_cut():
    """Each text is new: its embeddings, and those of all the others, must not be kept."""

    def direct(session, chunk):
        if chunk.index % 10 == 4:
            session.prompt = "a dog runs in the snow" + " ." * (chunk.index // 10)
        if chunk.index % 10 == 9:
            session.cut("a fox sleeps on the grass" + " ." * (chunk.index // 10))

    with endless_stream(**LARGE) as session:
        consume_in_flat_memory(session, 200, direct)
        assert len(session._denoiser.prompts._encoded) <= 2


def test_memory_stays_flat_while_frames_are_decoded():
    """In a thread of its own, as an application that shows them would."""

    def look(session, chunk):
        assert chunk.frames.shape[1:3] == ((4 * CHUNK_SIZE, 3) if chunk.index else (4 * CHUNK_SIZE - 3, 3))
        assert torch.isfinite(chunk.frames).all()

    with endless_stream(output_type="pt", async_decode=True) as session:
        consume_in_flat_memory(session, 120, look)


def test_the_frames_say_where_they_are_however_late():
    with endless_stream() as session:
        for _ in range(100):
            chunk = next(session)
    assert chunk.start_frame == 1 + 4 * (99 * CHUNK_SIZE - 1)


@pytest.mark.parametrize("relative_rope", [False, True])
def test_an_endless_stream_begins_like_a_video_of_a_given_length(relative_rope):
    options = {"relative_rope": relative_rope}
    with endless_stream(**options) as endless, endless_stream(num_frames=37, **options) as limited:
        for expected in limited:
            assert torch.equal(next(endless).latents, expected.latents)


def test_a_video_of_a_given_length_may_pass_1024_latent_frames_too():
    """It is not refused, and begins; how it goes on beyond them is seen above."""
    with endless_stream(num_frames=1 + 4 * (1040 - 1)) as session:
        assert torch.isfinite(next(session).latents).all()
