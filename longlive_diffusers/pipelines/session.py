"""StreamingSession: one video (or batch of videos) being made, handed over chunk by chunk.

The session and its denoiser hold all that changes while a video is made, so that a pipeline can serve any number of
sessions, advanced in any order.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from ..models.streaming_vae import StreamingDecoder
from .denoiser import ChunkDenoiser, DenoisedChunk
from .pipeline_output import Frames, VideoChunk
from .prefetch import Prefetcher


if TYPE_CHECKING:
    from .pipeline_longlive import LongLivePipeline


class StreamingSession:
    """
    Iterating yields [`VideoChunk`]s. Made by [`LongLivePipeline.stream`]; close it, or use it as a context manager, to
    free its caches.

    `session.prompt = "..."` changes the prompt from the next chunk on, and rewrites the cached history under it;
    `session.cut("...")` begins a new shot with the next chunk. Either replaces what was planned after it. With
    asynchronous decoding, denoising is ahead of what has been yielded: the next chunk is the next to be denoised.

    Args:
        pipeline: Whose VAE decodes.
        denoiser: Makes the latents.
        output_type: Layout of the frames.
        is_single: Whether a chunk's prompt and shot are one video's, or lists.
        async_decode: Denoise in a thread of its own, ahead of decoding.
    """

    def __init__(
        self,
        pipeline: "LongLivePipeline",
        denoiser: ChunkDenoiser,
        *,
        output_type: str,
        is_single: bool,
        async_decode: bool,
    ):
        self.pipeline, self.output_type = pipeline, output_type
        self._denoiser, self._is_single = denoiser, is_single
        self._decoder = None if output_type == "latent" else StreamingDecoder(pipeline.vae)
        self._decode_stream = None
        self._closed = False
        self._source: Iterator[DenoisedChunk] = denoiser.chunks()
        if async_decode:
            if denoiser.device.type == "cuda":
                # Neither model works on the default stream: what waits there for frames would hold up the other.
                self._source = _on_stream(self._source, torch.cuda.Stream(denoiser.device))
                if self._decoder is not None and pipeline.vae_device == denoiser.device:
                    self._decode_stream = torch.cuda.Stream(denoiser.device)
            self._source = Prefetcher(self._source)

    def __iter__(self) -> "StreamingSession":
        return self

    def __next__(self) -> VideoChunk:
        if self._closed:
            raise StopIteration
        try:
            chunk = next(self._source)
            frames = self._decode(chunk)
        except BaseException:  # the end of the stream included: nothing is left half-open
            self.close()
            raise
        # The video's first latent frame is a single frame, every later one as many as the VAE makes of it.
        start = max(0, 1 + self.pipeline.vae_scale_factor_temporal * (chunk.index * chunk.latents.shape[2] - 1))
        shots = self._one_or_all([prompt.shot_index for prompt in chunk.prompts])
        prompts = self._one_or_all([prompt.prompt for prompt in chunk.prompts])
        return VideoChunk(frames, chunk.latents, chunk.index, shots, prompts, start)

    @property
    def prompt(self) -> str | list[str | None] | None:
        """The prompt of the next chunk; setting it switches, with recache. A list where a batch is streamed."""
        return self._one_or_all(self._denoiser.prompts.upcoming())

    @prompt.setter
    def prompt(self, prompt: str | list[str]) -> None:
        self._check_open()
        self._denoiser.prompts.redirect(prompt, cut=False)

    def cut(self, prompt: str | list[str]) -> None:
        """Begin a new shot with the next chunk."""
        self._check_open()
        self._denoiser.prompts.redirect(prompt, cut=True)

    def interrupt(self) -> None:
        """End the stream with the chunk in progress, after its current step; callable from any thread."""
        self._denoiser.run.interrupt = True

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the KV caches."""
        return sum(cache.num_bytes for cache in self._denoiser.caches)

    def close(self) -> None:
        """Stop, and free the caches. Further iteration ends at once."""
        if self._closed:
            return
        self._closed = True
        self._source.close()
        self._denoiser.caches = []
        self._decoder = None
        self.pipeline.maybe_free_model_hooks()

    def __enter__(self) -> "StreamingSession":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _decode(self, chunk: DenoisedChunk) -> Frames:
        """The chunk's frames, in the output layout."""
        if self._decoder is None:
            return chunk.latents
        stream = self._decode_stream
        if stream is not None:
            stream.wait_event(chunk.ready)
            chunk.latents.record_stream(stream)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            frames = self.pipeline.decode_chunk(self._decoder, chunk.latents, self.output_type)
        if stream is not None:
            consumer = torch.cuda.current_stream(chunk.latents.device)
            consumer.wait_stream(stream)
            if isinstance(frames, torch.Tensor):
                frames.record_stream(consumer)
        return frames

    def _one_or_all(self, values: list):
        """A single video's value by itself, a batch's as a list."""
        return values[0] if self._is_single else values

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("This session is closed.")


def _on_stream(chunks: Iterator[DenoisedChunk], stream: torch.cuda.Stream) -> Iterator[DenoisedChunk]:
    """Run a generator, in the one thread that iterates it, on a CUDA stream of its own."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))  # embeddings and conditions were made there
    with torch.cuda.stream(stream):
        yield from chunks
