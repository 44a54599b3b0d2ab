"""How long a chunk took: what is in it, and what is not."""

import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from longlive_diffusers.models.streaming_vae import StreamingDecoder
from longlive_diffusers.models.transformer_longlive import LongLiveTransformer3DModel
from longlive_diffusers.pipelines.pipeline_output import VideoChunk
from longlive_diffusers.pipelines.stopwatch import Stopwatch
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


CPU = torch.device("cpu")


class Clock(threading.local):
    """A clock that stands still but for the work that is done; every thread has one."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("longlive_diffusers.pipelines.stopwatch.time", SimpleNamespace(perf_counter=self.read))

    def read(self) -> float:
        return self.now

    def let_take(self, monkeypatch, owner: type, name: str, seconds) -> None:
        """Let every call of a method take as long as `seconds` says of its keyword arguments."""
        method = getattr(owner, name)

        def slow(*args, **kwargs):
            self.now += seconds(*args, **kwargs)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Encoding a text takes 1000 s, a solver step 10, a pass over clean latents 1, decoding 0.1."""
    clock = Clock(monkeypatch)
    forward = lambda _, latents, timestep, *args, **options: 10 if timestep.any() else 1  # noqa: E731
    clock.let_take(monkeypatch, LongLiveTransformer3DModel, "forward", forward)
    clock.let_take(monkeypatch, StreamingDecoder, "decode", lambda *_: 0.1)
    clock.let_take(
        monkeypatch, type(tiny_pipeline()), "_embed_prompts", lambda _, prompts, *args, **kw: 1000 * len(prompts)
    )
    return clock


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("output_type", ["np", "uint8", "pt", "pil"])
def test_denoising_ends_with_the_latents_and_decoding_is_apart(clock, asynchronous, output_type):
    with tiny_pipeline().stream(**tiny_arguments(output_type=output_type, async_decode=asynchronous)) as session:
        chunks = list(session)
    assert [chunk.denoise_seconds for chunk in chunks] == pytest.approx([20, 20])
    assert [chunk.decode_seconds for chunk in chunks] == pytest.approx([0.1, 0.1])


def test_a_new_prompt_is_encoded_and_recached_within_its_chunk(clock):
    times = []
    with tiny_pipeline().stream(**tiny_arguments(num_frames=None)) as session:
        for chunk in itertools.islice(session, 4):
            times.append(chunk.denoise_seconds)
            assert chunk.decode_seconds == 0, "latents only"
            if chunk.index == 1:
                session.prompt = "a dog"
            if chunk.index == 2:
                session.cut("a dog in the snow")
    recached = 2  # chunks in the window, rewritten one by one
    assert times == pytest.approx([20, 20, 1000 + recached + 20, 2000 + 20])


def test_the_chunks_of_a_continued_video_are_there(clock):
    video = torch.randn(1, 8, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    with tiny_pipeline().stream(**tiny_arguments(num_frames=21, video_latents=video, output_type="np")) as session:
        chunks = list(session)
    assert [chunk.denoise_seconds for chunk in chunks] == pytest.approx([0, 0, 20])
    assert [chunk.decode_seconds for chunk in chunks] == pytest.approx([0.1] * 3)


def test_guidance_doubles_it(clock):
    with tiny_pipeline().stream(**tiny_arguments(guidance_scale=3.0)) as session:
        assert [chunk.denoise_seconds for chunk in session] == pytest.approx([40, 40])


def test_on_a_cpu_the_real_clock_is_read():
    stopwatch = Stopwatch(CPU)
    assert stopwatch.seconds == 0
    time.sleep(0.02)
    stopwatch.stop()
    first = stopwatch.seconds
    assert 0.02 <= first < 2 and stopwatch.seconds == first
    time.sleep(0.01)
    stopwatch.stop()
    assert stopwatch.seconds > first


class FakeEvent:
    """An event that is done two seconds after the device's clock said, and must be waited for."""

    def __init__(self, enable_timing: bool = False):
        assert enable_timing, "else it has no time"
        self.is_done = False

    def record(self, stream) -> None:
        self.stream, self.milliseconds = stream, stream.now
        stream.marks += 1

    def synchronize(self) -> None:
        self.is_done = True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.is_done, "the work is not done"
        return end.milliseconds - self.milliseconds


def test_on_a_gpu_its_own_clock_is_read_in_the_current_stream_and_waited_for_when_asked(monkeypatch):
    stream = SimpleNamespace(now=500.0, marks=0)
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: {"cuda:1": stream}[str(device)])
    stopwatch = Stopwatch(torch.device("cuda", 1))
    stream.now = 1750.0
    stopwatch.stop()
    assert stream.marks == 2 and not stopwatch._ended.is_done
    assert stopwatch.seconds == 1.25


def test_a_chunk_needs_no_stopwatch():
    chunk = VideoChunk(frames=torch.zeros(1), latents=torch.zeros(1), index=0, shot_index=0, prompt="a", start_frame=0)
    assert (chunk.denoise_seconds, chunk.decode_seconds) == (0.0, 0.0)
    assert "stopwatch" not in repr(chunk)
