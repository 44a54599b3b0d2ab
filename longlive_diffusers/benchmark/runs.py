"""The measurements of `longlive bench`. Every timer waits for the device before it starts and before it stops."""

import math
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..latency import Latency
from ..pipelines.decoder import ChunkDecoder
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..pipelines.session import StreamingSession
from .measure import synchronize
from .sizes import BenchSize


# These match the names of PyTorch's operators. Where attention is not fused, only it has batched products.
_ATTENTION = re.compile(r"attention|attn|flash|fmha|sage|aten::(bmm|baddbmm|_softmax|softmax)$", re.IGNORECASE)
_LINEAR = re.compile(r"aten::(mm|addmm|linear|_scaled_mm|_addmm_activation|mkldnn_linear)$|mkldnn::|mkl::")


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
        best = min(best, _seconds(lambda: left @ right, device))
    return 2 * side**3 / best


@torch.no_grad()
def measure_forward(
    pipe: LongLivePipeline, size: BenchSize, embeds: torch.Tensor, device: torch.device
) -> dict[str, float]:
    """Measure one forward of the transformer at the full window: its seconds, and how they divide (from a separate,
    profiled run).

    Returns:
        `seconds` and its parts `attention`, `linear` and `rest`, which are the profile's shares applied to `seconds`;
        NaN where the profiler could not see the device at work.
    """
    transformer = pipe.transformer
    cache = transformer.create_kv_cache(
        1, size.height, size.width, window_size=size.window_size, sink_size=size.sink_size, multi_shot_sink=True
    )
    for _ in range(size.chunks_to_fill):
        cache.begin_chunk(size.chunk_size)
    shape = (1, size.transformer["in_channels"], size.chunk_size, size.height, size.width)
    latents = torch.randn(shape, device=device, dtype=transformer.dtype)
    timestep = torch.full((1, size.chunk_size), 500.0, device=device)
    forward = lambda: transformer(latents, timestep, embeds, kv_cache=cache, return_dict=False)  # noqa: E731
    for _ in range(3):
        forward()
    times: list[float] = []
    while _agreed(pipe, len(times) < 5 or (sum(times) < 2.0 and len(times) < 50)):
        times.append(_seconds(forward, device))
    seconds = statistics.median(times)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    # Kineto, which is under the profiler, logs to stderr when it starts and stops. It asks nothing but this variable.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=activities, acc_events=True) as profiler:
        forward()
        synchronize(device)
    parts: dict[str, float] = {"attention": 0.0, "linear": 0.0, "rest": 0.0}
    for event in profiler.key_averages():
        # Kernels are counted with the operator that launched them.
        if event.device_type == DeviceType.CPU:
            on_device = device.type == "cuda"
            parts[kind_of(event.key)] += event.self_device_time_total if on_device else event.self_cpu_time_total
    total = sum(parts.values()) or math.nan
    return {"seconds": seconds, **{name: seconds * value / total for name, value in parts.items()}}


def kind_of(operator: str) -> str:
    """Whether an operator of the profile belongs to attention, to the linear layers, or to the rest."""
    if _ATTENTION.search(operator):
        return "attention"
    return "linear" if _LINEAR.match(operator) else "rest"


def measure_denoise(
    pipe: LongLivePipeline,
    size: BenchSize,
    embeds: torch.Tensor,
    device: torch.device,
    num_chunks: int,
    kv_cache_dtype: torch.dtype | str | None = None,
) -> tuple[list[float], list[torch.Tensor], int]:
    """Measure the seconds of each chunk (steps, clean pass, solver and noise), and return them with the chunks'
    latents and the bytes of the KV cache. Nothing is decoded."""
    seconds, latents, kv_cache_bytes = [], [], 0
    options = {"output_type": "latent", "kv_cache_dtype": kv_cache_dtype}
    with _stream(pipe, size, embeds, num_chunks, **options) as session:
        while len(seconds) < num_chunks:
            synchronize(device)
            began = time.perf_counter()
            latents.append(next(session).latents)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
            kv_cache_bytes = session.kv_cache_bytes
    return seconds, latents, kv_cache_bytes


def measure_decode(pipe: LongLivePipeline, latents: list[torch.Tensor], device: torch.device) -> list[float]:
    """Measure the seconds to decode each chunk, alone on the device."""
    decoder = ChunkDecoder(pipe.vae, pipe.video_processor, "pt", pipe.vae_device, group=pipe.vae_group)
    return [_seconds(lambda chunk=chunk: decoder.decode(chunk), device) for chunk in latents]


def measure_whole(
    pipe: LongLivePipeline, size: BenchSize, embeds: torch.Tensor, device: torch.device, *, async_decode: bool
) -> dict[str, Any]:
    """Measure a whole video, denoised and decoded; its frames are brought to the host, as bytes.

    Returns:
        `seconds`, `first_frame` (seconds until the first chunk's frames are there), `frames_per_second`,
        `kv_cache_bytes`, and the `latency` of the chunks, as [`Latency`] has it.
    """
    latency, kv_cache_bytes = Latency(), 0
    synchronize(device)
    began = time.perf_counter()
    with _stream(pipe, size, embeds, size.num_chunks, output_type="uint8", async_decode=async_decode) as session:
        for _ in range(size.num_chunks):
            frames = next(session).frames
            assert isinstance(frames, np.ndarray)
            latency.add(time.perf_counter() - began, frames.shape[1])
            kv_cache_bytes = max(kv_cache_bytes, session.kv_cache_bytes)  # freed before the last chunk is fetched
        synchronize(device)
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "first_frame": latency.first_frame,
        "frames_per_second": size.num_frames(size.num_chunks) / seconds,
        "kv_cache_bytes": kv_cache_bytes,
        "latency": latency.as_dict(),
    }


def _stream(
    pipe: LongLivePipeline, size: BenchSize, embeds: torch.Tensor, num_chunks: int, **options
) -> StreamingSession:
    return pipe.stream(
        prompt_embeds=embeds,
        height=size.height * pipe.vae_scale_factor_spatial,
        width=size.width * pipe.vae_scale_factor_spatial,
        num_frames=size.num_frames(num_chunks),
        num_inference_steps=size.num_inference_steps,
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def _agreed(pipe: LongLivePipeline, goes_on: bool) -> bool:
    """Whether to measure once more; processes that share the work follow the first one's clock."""
    return goes_on if pipe.stream_ranks is None else pipe.stream_ranks.tell("orders", goes_on)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began
