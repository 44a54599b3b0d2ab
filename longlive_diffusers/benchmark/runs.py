"""The measurements of `longlive bench`. Every timer waits for the device before it starts and before it stops."""

import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..latency import Latency
from ..models.kv_cache import KVCache
from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..pipelines.decoder import ChunkDecoder
from .measure import synchronize
from .setup import Setup


Forward = Callable[[], object]


@dataclass(frozen=True)
class FullWindowForward:
    """
    One forward of the transformer on a chunk at the full window, whose result is the same each time.

    Args:
        transformer, args, kwargs: What is called, with all that the pipeline passes to it.
    """

    transformer: LongLiveTransformer3DModel
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def __call__(self) -> object:
        return self.transformer(*self.args, **self.kwargs)

    @property
    def kv_cache(self) -> KVCache:
        return self.kwargs["kv_cache"]


def matmul_side(device_type: str) -> int:
    """Return the side of square matrices that are large enough to keep the device busy."""
    return 2048 if device_type == "cpu" else 8192


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the device's own rate in FLOP/s, for a square matrix product: the best within a second.

    One product of the full size would take half a minute on a CPU that has no instructions for a half-precision dtype;
    where a small product shows that, its rate is returned.
    """
    side, small = matmul_side(device.type), 256
    rate = _matmul_rate(small, device, dtype, seconds=0.1)
    return rate if 2 * side**3 / rate > 5.0 else _matmul_rate(side, device, dtype, seconds=1.0)


def _matmul_rate(side: int, device: torch.device, dtype: torch.dtype, *, seconds: float) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        best = min(best, timed(lambda: left @ right, device))
    return 2 * side**3 / best


@contextmanager
def full_window_forward(setup: Setup) -> Iterator[FullWindowForward]:
    """Make a video until the KV cache is full, and give the transformer's last forward, that of the last solver
    step."""
    call: dict[str, Any] = {}

    def remember(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call.update(args=args, kwargs=kwargs)

    transformer = setup.pipe.transformer
    with setup.stream(setup.size.chunks_to_fill, output_type="latent") as session:
        hook = transformer.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            for _ in range(setup.size.chunks_to_fill):
                next(session)
        finally:
            hook.remove()
        yield FullWindowForward(transformer, **call)


def measure_forward(forward: Forward, setup: Setup) -> tuple[float, float | None]:
    """Measure the seconds of one forward at the full window, and how long the host was busy with it before it waited,
    each the median of 5 to 50. On a CPU, which is its own host, the latter is None."""
    for _ in range(3):
        forward()
    times: list[float] = []
    busy: list[float] = []
    while _agreed(setup, len(times) < 5 or (sum(times) < 2.0 and len(times) < 50)):
        synchronize(setup.device)
        began = time.perf_counter()
        forward()
        busy.append(time.perf_counter() - began)
        synchronize(setup.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times), None if setup.device.type == "cpu" else statistics.median(busy)


def denoised_chunks(setup: Setup, num_chunks: int) -> Generator[tuple[float, torch.Tensor], None, None]:
    """Make a video without decoding it; yield the seconds of each chunk (steps, solver and noise, and the clean pass
    of the chunk before) and its latents."""
    with setup.stream(num_chunks + 1, output_type="latent") as session:  # the last chunk of a video has no clean pass
        for _ in range(num_chunks):
            synchronize(setup.device)
            began = time.perf_counter()
            latents = next(session).latents
            synchronize(setup.device)
            yield time.perf_counter() - began, latents


def measure_denoise(setup: Setup, num_chunks: int) -> tuple[list[float], list[torch.Tensor]]:
    """Measure the seconds of each chunk, and return them with the chunks' latents. Nothing is decoded."""
    chunks = list(denoised_chunks(setup, num_chunks))
    return [seconds for seconds, _ in chunks], [latents for _, latents in chunks]


def decoded_chunks(setup: Setup, latents: Iterable[torch.Tensor]) -> Iterator[float]:
    """Decode a video's chunks in order, alone on the device; yield the seconds of each."""
    pipe = setup.pipe
    network = pipe.vae if setup.decoder is None else setup.decoder
    decoder = ChunkDecoder(network, pipe.video_processor, "pt", pipe.vae_device, group=pipe.vae_group)
    for chunk in latents:
        yield timed(lambda chunk=chunk: decoder.decode(chunk), setup.device)


def measure_whole(setup: Setup, *, async_decode: bool) -> dict[str, Any]:
    """Measure a whole video, denoised and decoded; its frames are brought to the host, as bytes.

    Returns:
        `seconds`, `frames_per_second`, and the `latency` of the chunks, as [`Latency`] has it.
    """
    latency, size = Latency(), setup.size
    synchronize(setup.device)
    began = time.perf_counter()
    options = {"output_type": "uint8", "async_decode": async_decode, "decoder": setup.decoder}
    with setup.stream(size.num_chunks, **options) as session:
        for _ in range(size.num_chunks):
            frames = next(session).frames
            assert isinstance(frames, np.ndarray)
            latency.add(time.perf_counter() - began, frames.shape[1])
        synchronize(setup.device)
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "frames_per_second": size.num_frames(size.num_chunks) / seconds,
        "latency": latency.as_dict(),
    }


def warm_up(setup: Setup, *, is_compiled: bool) -> None:
    """Run everything once. To a compiler and to a GPU's libraries, each length of the cache is a new shape."""
    is_by_shape = is_compiled or setup.device.type == "cuda"
    _, latents = measure_denoise(setup, setup.size.chunks_to_fill + 1 if is_by_shape else 2)
    for _ in decoded_chunks(setup, latents[:2]):
        pass


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that some work takes."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def _agreed(setup: Setup, goes_on: bool) -> bool:
    """Whether to measure once more; processes that share the work follow the first one's clock."""
    ranks = setup.pipe.stream_ranks
    return goes_on if ranks is None else ranks.tell("orders", goes_on)
