"""Asynchronous decoding on a GPU: nothing is read before it is written, on streams that remember their order."""

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers.video_processor import VideoProcessor

from longlive_diffusers.models.streaming_vae import StreamingDecoder
from longlive_diffusers.pipelines.async_workers import AsyncWorkers
from longlive_diffusers.pipelines.decoder import ChunkDecoder
from longlive_diffusers.pipelines.denoiser import DenoisedChunk
from longlive_diffusers.pipelines.run_state import RunState
from longlive_diffusers.pipelines.session import StreamingSession
from longlive_diffusers.pipelines.shots import ChunkPrompt
from tests.support.fake_cuda_streams import FakeStream, happens, known, put_in_place, stream
from tests.support.tiny_vae import tiny_vae


GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NUM_CHUNKS = 4
CASES = ["one GPU", "the VAE on another GPU", "latents only"]


@pytest.fixture
def kept_for(monkeypatch) -> list[tuple[torch.Tensor, FakeStream]]:
    """Fake streams, and which tensors were kept for which of them."""
    return put_in_place(monkeypatch)


class Denoiser:
    """Makes chunks of noise, and says on which stream."""

    device = GPU
    is_busy_here = False
    prompts = SimpleNamespace(warn_of_unused=lambda: None)

    def __init__(self, num_chunks: int = NUM_CHUNKS):
        self.own_caches, self.run, self.num_chunks = [], RunState(1.0, 0, None), num_chunks
        self.threads, self.unfinished = set(), None

    def chunks(self):
        for index in range(self.num_chunks):
            self.threads.add(threading.get_ident())
            assert "embedded" in known(), "the embeddings may not be there yet"
            self.finish_chunk()  # only if nobody has
            assert index == 0 or ("finished", index - 1) in known(), "the cache is written before it is read"
            happens(("denoised", index))
            self.unfinished = index
            yield DenoisedChunk(torch.randn(1, 8, 2, 4, 4), index, [ChunkPrompt("a", 0, False)])

    def finish_chunk(self) -> None:
        if self.unfinished is not None:
            assert ("denoised", self.unfinished) in known(), "the latents are read, and the cache"
            happens(("finished", self.unfinished))
            self.unfinished = None

    def end(self) -> None:
        """There is nobody to tell."""


def begin(case: str, workers: AsyncWorkers, denoiser: Denoiser) -> StreamingSession:
    """A session in which the work is done on a CPU, in the order in which a GPU would be given it."""
    decoder = None
    if case != "latents only":
        decode_stream = workers.decode_stream(GPU) if case == "one GPU" else None
        decoder = ChunkDecoder(tiny_vae(), VideoProcessor(), "pt", CPU, stream=decode_stream)
    return StreamingSession(denoiser, decoder, is_single=True, worker=workers.denoise_worker(GPU))


@pytest.fixture
def reads(monkeypatch) -> list[bool]:
    """For each chunk that was decoded, whether its latents were sure to be there. Nothing is decoded after the chunk's
    clean pass."""
    found, decode = [], StreamingDecoder.decode

    def noted(self, latents):
        assert ("finished", len(found)) not in known(), "decoding waits for the clean pass"
        found.append(("denoised", len(found)) in known())
        happens(("decoded", len(found) - 1))
        return decode(self, latents)

    monkeypatch.setattr(StreamingDecoder, "decode", noted)
    return found


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_before_it_is_written(case, reads, kept_for):
    workers = AsyncWorkers()
    happens("embedded")
    with begin(case, workers, Denoiser()) as session:
        for index, chunk in enumerate(session):
            assert ("denoised", index) in known(), "the consumer gets the latents"
            assert case == "latents only" or ("decoded", index) in known(), "and the frames"
            consumers = {stream for tensor, stream in kept_for if tensor is chunk.latents}
            expected = {workers.decode_stream(GPU)} if case == "one GPU" else set()
            assert expected < consumers and len(consumers) == len(expected) + 1, "their memory is kept for as long"
    assert index == NUM_CHUNKS - 1
    assert reads == ([] if case == "latents only" else [True] * NUM_CHUNKS)


@pytest.mark.parametrize("case", ["the VAE on another GPU", "latents only"])
def test_the_check_sees_a_wait_that_is_missing(case, reads, kept_for, monkeypatch):
    monkeypatch.setattr("longlive_diffusers.pipelines.session._hand_over", lambda latents, ready: None)
    happens("embedded")
    with begin(case, AsyncWorkers(), Denoiser()) as session:
        assert not any(("denoised", index) in known() for index, _ in enumerate(session))
    assert not any(reads)


def test_denoising_waits_for_the_stream_of_whoever_asked(kept_for):
    """Embeddings are made on the caller's current stream, which need not be the default one."""
    own = FakeStream(GPU)
    with stream(own):
        happens("embedded")
        session = begin("latents only", AsyncWorkers(), Denoiser())
    with session:
        assert len(list(session)) == NUM_CHUNKS


def test_closing_lets_the_caller_wait_for_what_was_begun(kept_for):
    """What the session frees, the caller's stream may use at once."""
    happens("embedded")
    session = begin("latents only", AsyncWorkers(), Denoiser())
    next(session)
    session.close()
    begun = {name for name in session._worker.stream.done if name[0] in ("denoised", "finished")}
    assert ("finished", 0) in begun and begun <= known()


def test_twenty_sessions_share_their_streams_and_their_thread(kept_for):
    """The memory of a stream is given to no other stream: it would stay behind with each session."""
    workers, threads = AsyncWorkers(), set()
    happens("embedded")
    for _ in range(20):
        denoiser = Denoiser(num_chunks=2)
        with begin("one GPU", workers, denoiser) as session:
            assert len(list(session)) == 2
        threads |= denoiser.threads
    assert len(FakeStream.created) == 2  # one to denoise, one to decode
    assert len(threads) == 1


def test_two_sessions_advance_in_turn(kept_for):
    workers = AsyncWorkers()
    happens("embedded")
    with begin("one GPU", workers, Denoiser()) as one, begin("one GPU", workers, Denoiser()) as other:
        indices = [(next(one).index, next(other).index) for _ in range(NUM_CHUNKS)]
    assert indices == [(index, index) for index in range(NUM_CHUNKS)]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda workers: pickle.loads(pickle.dumps(workers))])
def test_a_copy_makes_workers_of_its_own(duplicate):
    workers = AsyncWorkers()
    worker = workers.denoise_worker(CPU)
    assert worker is workers.denoise_worker(CPU)
    assert duplicate(workers).denoise_worker(CPU) is not worker
