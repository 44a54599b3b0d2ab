"""The threads and CUDA streams that the asynchronous sessions of a pipeline share.

They outlive the sessions, because what belongs to a thread or a stream outlives its use: PyTorch's allocator gives the
memory of one stream to no other, so a stream for each session would leave gigabytes of KV cache behind each time, and
cuDNN plans its attention kernels once for each thread.
"""

import threading
from collections.abc import Callable, Generator
from dataclasses import replace

import torch

from .denoiser import DenoisedChunk
from .prefetch import OneThread


class DenoiseWorker:
    """
    The thread in which sessions denoise on one device and, on a GPU, the stream.

    Args:
        device: The device of the transformer.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.thread = OneThread("longlive-denoise")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def chunks(self, source: Generator[DenoisedChunk, None, None]) -> Generator[DenoisedChunk, None, None]:
        """Return `source`, to be iterated in this worker's thread: its chunks are made on the stream, once what the
        caller's stream was given so far is done, and each knows when it is ready."""
        if self.stream is None:
            return source
        # Here, not when the first chunk is made: the thread that will make it has a current stream of its own.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # embeddings and conditions were made there
        return _on_stream(source, self.stream)

    def on_stream(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does `work` on the stream, to be called in this worker's thread."""
        stream = self.stream
        if stream is None:
            return work

        def work_on_stream() -> None:
            with torch.cuda.stream(stream):
                work()

        return work_on_stream

    def join_stream(self) -> None:
        """Let the caller's stream wait for everything that was begun: what is freed now may be reused there."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class AsyncWorkers:
    """The workers of one pipeline, made when they are first needed. A copy of a pipeline makes its own."""

    def __init__(self):
        self._denoise: dict[torch.device, DenoiseWorker] = {}
        self._decode_streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lock = threading.Lock()  # sessions may begin in several threads

    def denoise_worker(self, device: torch.device) -> DenoiseWorker:
        """Return the worker that denoises on `device`."""
        with self._lock:
            if device not in self._denoise:
                self._denoise[device] = DenoiseWorker(device)
            return self._denoise[device]

    def decode_stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream for decoding on the GPU that also denoises."""
        with self._lock:
            if device not in self._decode_streams:
                self._decode_streams[device] = torch.cuda.Stream(device)
            return self._decode_streams[device]

    def __getstate__(self) -> dict:
        return {}  # threads and streams can be neither copied nor pickled

    def __setstate__(self, state: dict) -> None:
        self.__init__()


def _on_stream(
    chunks: Generator[DenoisedChunk, None, None], stream: torch.cuda.Stream
) -> Generator[DenoisedChunk, None, None]:
    """Run a generator on a CUDA stream, in the one thread that iterates over it."""
    try:
        while True:
            with torch.cuda.stream(stream):
                chunk = next(chunks, None)
                if chunk is None:
                    return
                ready = torch.cuda.Event()
                ready.record(stream)
            yield replace(chunk, ready=ready)
    finally:
        chunks.close()
