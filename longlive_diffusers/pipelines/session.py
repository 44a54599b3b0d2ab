"""StreamingSession: one video (or batch of videos) being made, handed over chunk by chunk.

The session, its denoiser and its decoder hold all that changes while a video is made, so that a pipeline can serve any
number of sessions, advanced in any order.
"""

import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from ..frame_counts import TEMPORAL_SCALE, pixel_frames
from ..parallel.agreement import ALONE, Agreement
from .async_workers import DenoiseWorker
from .decoder import ChunkDecoder
from .denoiser import ChunkDenoiser, DenoisedChunk
from .memory import ADVICE
from .pipeline_output import VideoChunk, check_numbers
from .prefetch import Prefetcher


class StreamingSession:
    """
    A video in the making; iterating over it yields [`VideoChunk`]s. It is created by [`LongLivePipeline.stream`];
    close it, or use it as a context manager, to free its caches. (Where several ranks share it, they are waiting for
    each other: a session that is dropped is closed, too.) It may be closed at any time, also by a callback, a
    signal handler, or another thread than the one that iterates over it (a stop button): the chunk in progress ends
    after its current step, and the iteration with it. (Shared by several ranks, without a callback after which they
    agree, it is made to its end.)

    `session.prompt = "..."` changes the prompt from the next chunk on, and rewrites the cached history under it;
    `session.blend("...")` does so little by little, over several chunks; `session.cut("...")` begins a new shot with
    the next chunk. Each replaces what was planned after it. With
    asynchronous decoding, denoising is ahead of what has been yielded: the next chunk is then the next to be denoised.

    With `split_first_chunk`, the first chunk comes in parts: [`VideoChunk`]s of the same index, one for each latent
    frame. What is said here of chunks holds for it when its last part is there (`chunk.is_complete`).

    Between two chunks, `session.num_inference_steps` and the pipeline's LoRAs (`pipe.set_adapters`) may be changed as
    well. With asynchronous decoding, LoRAs are better changed by a callback: it runs in the thread that denoises.

    Args:
        denoiser: Makes the latents.
        decoder: Decodes them to frames; None if chunks have latents only.
        is_single: Whether a chunk's prompt and shot index are those of a single video, not lists.
        worker: Denoises in its own thread (and stream), ahead of decoding; None to denoise and decode in turn.
        takes_turns: Whether there is only one model on the device at a time (offloading): a chunk is then finished
            before it is decoded, and the network is not fetched again in between.
        splits_first_chunk: Whether the first chunk is handed over in parts of a latent frame, each as soon as it is
            decoded. Where there is a decoder.
        agreement: What the ranks that share the stream agree by; its first rank decides when the stream ends, and
            closing it on another waits for that.
        temporal_scale: The number of pixel frames that a latent frame stands for.
        on_close: Called once, when the session is closed.
    """

    _freed = True  # as long as it has not begun, and has nothing to free

    def __init__(
        self,
        denoiser: ChunkDenoiser,
        decoder: ChunkDecoder | None,
        *,
        is_single: bool,
        agreement: Agreement = ALONE,
        worker: DenoiseWorker | None = None,
        takes_turns: bool = False,
        splits_first_chunk: bool = False,
        temporal_scale: int = TEMPORAL_SCALE,
        on_close: Callable[[], object] | None = None,
    ):
        self._closed, self._freed, self._worker, self._takes_turns = False, False, worker, takes_turns
        self._agreement, self._is_over = agreement, False  # whether all ranks know that no chunk is handed over now
        self._denoiser, self._decoder, self._is_single = denoiser, decoder, is_single
        self._temporal_scale, self._on_close = temporal_scale, on_close
        self._splits_first_chunk = splits_first_chunk and decoder is not None
        self._chunk: DenoisedChunk | None = None  # whose parts are being handed over
        self._parts: tuple[torch.Tensor, ...] = ()  # its latents, divided
        self._next_part = 0
        self._turn = threading.Lock()  # held while a chunk is made and decoded, and while all is freed
        self._threads: set[int] = set()  # those that hold it, or wait for it
        chunks = denoiser.chunks()
        self._source: Prefetcher[DenoisedChunk] | Generator[DenoisedChunk, None, None] = (
            chunks
            if worker is None
            else Prefetcher(
                worker.chunks(chunks),
                worker.thread,
                after=worker.on_stream(denoiser.finish_chunk),
                stop=denoiser.run.close,
            )
        )

    def __iter__(self) -> "StreamingSession":
        return self

    def __next__(self) -> VideoChunk:
        if self._is_busy_here():
            raise ValueError("A callback cannot ask its own session for the next chunk: it is called in mid-chunk.")
        if self._is_in_worker():
            raise ValueError(
                "A callback of a session with `async_decode` cannot ask another one for its next chunk: both denoise "
                "in the thread that this callback keeps busy."
            )
        with self._own_turn():
            try:
                return self._next_chunk()
            except StopIteration:
                self._end()
                raise
            except BaseException as error:  # nothing is left half-open
                if isinstance(error, torch.OutOfMemoryError):
                    error.add_note(ADVICE)
                self._fail(error)

    def _next_chunk(self) -> VideoChunk:
        if self._closed:
            raise StopIteration
        chunk = self._advance()
        if chunk is None or self._closed:  # closed meanwhile: the chunk is not complete
            raise StopIteration
        return chunk

    def _advance(self) -> VideoChunk | None:
        """Make and decode the next chunk, or the next part of one; None at the end of the stream, as the first rank
        decides.

        The chunk is finished, written to the cache, after it was decoded: on a GPU that is still under way when the
        caller has the frames. It must have begun by then, because between two chunks the caller may change LoRAs.
        """
        begins = self._next_part == len(self._parts)
        if begins:
            self._chunk = next(self._source, None)
            if self._chunk is None and not self._denoiser.run.is_ending:
                self._denoiser.prompts.warn_of_unused()
        chunk = self._chunk
        self._is_over = self._agreement.turn(chunk is None or self._closed)
        if self._is_over or chunk is None:
            return None
        if begins:
            self._begin_parts(chunk)
        part, self._next_part = self._next_part, self._next_part + 1
        latents = self._parts[part]
        if self._decoder is None:
            check_numbers(latents)
            frames = latents.clone()  # what the caller does to them must not change what history is rewritten from
        else:
            frames = self._decoder.decode(latents, chunk.ready)
        if self._worker is None and self._next_part == len(self._parts):  # a worker does so in its own thread
            self._denoiser.finish_chunk()
        first_frame = chunk.index * chunk.latents.shape[2] + sum(part.shape[2] for part in self._parts[:part])
        return VideoChunk(
            frames=frames,
            latents=latents,
            index=chunk.index,
            shot_index=self._one_or_all([prompt.shot_index for prompt in chunk.prompts]),
            prompt=self._one_or_all([prompt.prompt for prompt in chunk.prompts]),
            start_frame=pixel_frames(first_frame, temporal_scale=self._temporal_scale),
            part=part,
            num_parts=len(self._parts),
            denoise_stopwatch=chunk.stopwatch if part == 0 else None,
            decode_stopwatch=None if self._decoder is None else self._decoder.stopwatch,
        )

    def _begin_parts(self, chunk: DenoisedChunk) -> None:
        """Prepare to hand over a chunk that has just been made."""
        if chunk.ready is not None:
            _hand_over(chunk.latents, chunk.ready)
        if self._takes_turns:
            self._denoiser.finish_chunk()
        is_split = self._splits_first_chunk and chunk.index == 0
        self._parts = chunk.latents.split(1, dim=2) if is_split else (chunk.latents,)
        self._next_part = 0

    @property
    def prompt(self) -> str | list[str | None] | None:
        """The prompt of the next chunk; a list where a batch is streamed. Setting it switches, with a recache."""
        return self._one_or_all(self._denoiser.prompts.upcoming())

    @prompt.setter
    def prompt(self, prompt: str | list[str]) -> None:
        self._check_open()
        self._denoiser.prompts.redirect(prompt, cut=False)

    def cut(self, prompt: str | list[str]) -> None:
        """Begin a new shot with the next chunk."""
        self._check_open()
        self._denoiser.prompts.redirect(prompt, cut=True)

    def blend(self, prompt: str | list[str], chunks: int = 4, *, interpolation: str = "linear") -> None:
        """
        Move from the present prompt to another one over the next chunks, within the shot: the embeddings of the first
        have the new prompt with weight `1 / chunks`, those of the last are the new prompt's. For each of them, the
        cached history is rewritten, as for a switch; `chunks=1` is `session.prompt = prompt`. `session.prompt` and
        `chunk.prompt` are the new prompt from the first of them on. The negative prompt stays as it is.

        A switch, a cut or another blend takes the place of one that is under way, with the next chunk; another blend
        begins from what is shown by then. Before the new frames of a video that is continued, it waits for them; a cut
        that is still to come becomes one to this prompt.

        Every token position moves by itself. Where one prompt has more tokens, they grow out of, or fade into, the
        zeros that prompts are filled up with, which the network attends to like to any token.

        Args:
            prompt: The new prompt; a list has one for each video of a batch.
            chunks: How many chunks it takes, from 1 to 16.
            interpolation: "linear", or "spherical": each token's vector turns evenly from one direction to the other,
                where a straight way would pass through shorter ones. Vectors of zeros, and those that lie nearly along
                one line, move straight.

        Raises:
            ValueError: If the session is closed, `prompt` is of another type or has not one prompt for each video, or
                `chunks` or `interpolation` is none of these.
        """
        self._check_open()
        self._denoiser.prompts.redirect(prompt, cut=False, chunks=chunks, interpolation=interpolation)

    @property
    def num_inference_steps(self) -> int:
        """The number of solver steps of the next chunk. Setting it changes it from the next chunk on, for instance
        together with a LoRA that was distilled to another number."""
        return self._denoiser.num_inference_steps

    @num_inference_steps.setter
    def num_inference_steps(self, num_inference_steps: int) -> None:
        self._check_open()
        self._denoiser.set_num_inference_steps(num_inference_steps)

    def interrupt(self) -> None:
        """End the stream with the chunk in progress, after its current step; callable from any thread. That chunk is
        handed over as it is, noisy, as diffusers' own pipelines return what they were interrupted in; with `close()`,
        it is not."""
        self._denoiser.run.interrupt = True

    @property
    def kv_cache_bytes(self) -> int:
        """The memory of the KV caches, in bytes."""
        return sum(kv_cache.num_bytes for kv_cache in self._denoiser.own_caches)

    @property
    def planned_cache_bytes(self) -> int:
        """The memory that the KV caches take once they are there, in bytes; before the first chunk, they are not."""
        return self._denoiser.planned_cache_bytes

    def close(self) -> None:
        """
        Stop, and free the caches. Further iteration ends at once.

        Where another thread is making a chunk, this waits until the chunk's current step is over; so a callback of
        this session must not wait for the thread that closes it. In a callback of this session, nothing can be waited
        for: what it closes is freed when the iteration ends, right after it. So it is in a signal handler that
        interrupts the iteration, or `close` itself, and in a callback of another session that denoises in the same
        thread (`async_decode`).
        """
        self._closed = self._denoiser.run.closed = True
        if self._is_busy_here():
            return
        if isinstance(self._source, Prefetcher) and self._agreement.leads:
            self._source.close()  # a consumer that waits for it holds the turn
        if not self._is_in_worker():
            with self._own_turn():
                self._end()
        elif self._turn.acquire(blocking=False):  # whoever holds it waits for this thread, and then ends the session
            try:
                self._end()
            finally:
                self._turn.release()

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        """Hold the turn. In a signal handler that interrupts this thread meanwhile, `close` cannot wait for it, and
        leaves the end to this thread: it is noted before it waits."""
        here = threading.get_ident()
        self._threads.add(here)
        try:
            with self._turn:
                yield
        finally:
            self._threads.discard(here)
            if self._closed and not self._freed:
                self.close()

    def _end(self) -> None:
        """End the stream on all ranks and free everything, once; the caller holds the turn, so that nothing is being
        made."""
        if self._freed:
            return
        self._closed = self._denoiser.run.closed = True
        try:
            if self._agreement.is_over:
                self._raise_failure()
            elif self._agreement.leads:
                self._lead_to_end()
            else:
                self._follow()
        except BaseException as error:
            self._fail(error)
        self._free()

    def _lead_to_end(self) -> None:
        self._source.close()
        if not self._agreement.is_alone:
            self._raise_failure()
        self._denoiser.end()
        if not self._is_over:
            self._is_over = self._agreement.turn(True)

    def _raise_failure(self) -> None:
        """Raise what the thread that denoises ended with, if nobody has asked it for a chunk since."""
        if self._denoiser.failure is not None:
            raise self._denoiser.failure

    def _follow(self) -> None:
        """Work on with the other ranks, until the first one ends the stream: it cannot be made without this one."""
        while not self._is_over:
            self._advance()
        for _ in self._source:  # chunks that the first rank began, and will not hand over
            pass

    def _fail(self, error: BaseException) -> NoReturn:
        """Free everything and raise the error, of which the other ranks get to know."""
        self._decoder = None  # which holds on to what connects the ranks
        try:
            self._agreement.fail(error)
        finally:
            if not self._freed:
                self._closed = self._denoiser.run.closed = True
                self._free()

    def _free(self) -> None:
        self._freed = True
        try:
            self._source.close()
            if self._worker is not None:
                self._worker.join_stream()
        finally:
            self._decoder = None
            self._agreement.end()
            if self._on_close is not None:
                self._on_close()

    def _is_busy_here(self) -> bool:
        """Whether the calling thread itself is getting or making a chunk, and so cannot wait for it: whether this is
        asked in a callback or a signal handler."""
        return threading.get_ident() in self._threads or self._denoiser.is_busy_here

    def _is_in_worker(self) -> bool:
        """Whether the calling thread is the one that denoises for this session, perhaps busy with another one."""
        return self._worker is not None and self._worker.thread.is_here

    def __enter__(self) -> "StreamingSession":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not self._agreement.is_alone and not self._freed:
            self._closed = self._denoiser.run.closed = True
            with self._own_turn():
                self._fail(error)
        self.close()

    def __del__(self) -> None:
        # The other ranks wait for this one. At the exit of the interpreter, its end is an error to them.
        if not self._freed and not self._agreement.is_alone and not sys.is_finalizing():
            self.close()

    def _one_or_all(self, values: list):
        """Return the value of a single video by itself, those of a batch as a list."""
        return values[0] if self._is_single else values

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("This session is closed.")


def _hand_over(latents: torch.Tensor, ready: torch.cuda.Event) -> None:
    """Let the consumer's stream wait for latents of another stream, and keep their memory for as long as it needs."""
    consumer = torch.cuda.current_stream(latents.device)
    consumer.wait_event(ready)
    latents.record_stream(consumer)
