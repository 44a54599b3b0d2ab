"""Everything that `longlive bench` measures of one setting, stage by stage."""

import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from ..dtypes import DTYPES, dtype_name
from ..pipelines.pipeline_longlive import LongLivePipeline
from .measure import peak_memory, reset_peak_memory, weights_bytes
from .options import BenchOptions
from .profiling import count_waits, profile_forward
from .runs import (
    decoded_chunks,
    full_window_forward,
    measure_denoise,
    measure_forward,
    measure_matmul,
    measure_whole,
    warm_up,
)
from .setup import Setup, build
from .sizes import forward_flops


Share = Callable[[LongLivePipeline], None]
LogStage = Callable[[str], None]


def measurements(options: BenchOptions, log_stage: LogStage, share: Share) -> Iterator[dict[str, Any]]:
    """Run all measurements, in an order in which none disturbs the next. Processes that share the work run them
    together.

    Args:
        options: What to measure.
        log_stage: Called with the name of each stage as it begins.
        share: Shares the pipeline with the other processes, if there are any.

    Yields:
        The results of each stage, by name: seconds, bytes and FLOP/s.
    """
    size, device = options.size, options.device
    log_stage("the device's matrix products")
    matmul = matmul_rates(options)
    yield {"matmul_flops_per_second": matmul}
    log_stage("building the networks")
    setup = build(options)
    share(setup.pipe)
    yield {"weights_bytes": weights(setup)}

    log_stage("warming up")
    warm_up(setup, is_compiled=options.compile)
    log_stage("one forward")
    yield measure_one_forward(setup, options, matmul[dtype_name(options.dtype)])
    log_stage("denoising")
    seconds, latents = measure_denoise(setup, size.num_chunks)
    denoise = statistics.median(seconds[size.chunks_to_fill - 1 :])
    yield {
        "denoise_chunk": denoise,
        "denoise_first_chunk": seconds[0],
        "denoise_all_chunks": sum(seconds),
        "host_waits_per_chunk": waits_per_chunk(setup),
    }
    log_stage("decoding")
    decoding = list(decoded_chunks(setup, latents))
    decode = statistics.median(decoding[1:] or decoding)
    yield {
        "decode_chunk": decode,
        "decode_first_chunk": decoding[0],
        "denoise_and_decode_chunk": denoise + decode,
    }
    del latents
    log_stage("whole videos")
    reset_peak_memory(device)
    synchronous = measure_whole(setup, async_decode=False)
    memory, memory_counts = peak_memory(device)
    yield {
        "synchronous": synchronous,
        "peak_memory_bytes": memory,
        "peak_memory_counts": memory_counts,
    }
    yield {"asynchronous": measure_whole(setup, async_decode=True)}


def matmul_rates(*settings: BenchOptions) -> dict[str, float]:
    """Measure the rate of matrix products in FLOP/s of the device that the settings have in common, by dtype: the
    networks', and the usual two."""
    names = dict.fromkeys(("float32", "bfloat16", *(dtype_name(options.dtype) for options in settings)))
    return {name: measure_matmul(settings[0].device, DTYPES[name]) for name in names}


def weights(setup: Setup) -> dict[str, int]:
    """Return the bytes of the weights that are used, by network."""
    decoder = {"vae": setup.pipe.vae} if setup.decoder is None else {"tiny_decoder": setup.decoder}
    return {name: weights_bytes(model) for name, model in {"transformer": setup.pipe.transformer, **decoder}.items()}


def measure_one_forward(setup: Setup, options: BenchOptions, matmul: float) -> dict[str, Any]:
    """
    Measure one forward of the transformer at the full window: its seconds, and how they divide (from a separate,
    profiled run).

    Args:
        setup, options: What to run.
        matmul: The device's rate of matrix products in the networks' dtype, FLOP/s.

    Returns:
        `forward`: its `seconds`, and those of its parts, which are the profile's shares of them (None where it has
        none). How much work it is, in all and by part, at which rate it is done, and how that compares with `matmul`.
        How long the host was busy, how many kernels there were, and which of these computed attention. The
        `kv_cache_bytes` of the full window.
    """
    with full_window_forward(setup) as forward:
        seconds, host_seconds = measure_forward(forward, setup)
        profiled = profile_forward(forward, setup.device)
        cache_bytes, num_keys = forward.kv_cache.num_bytes, forward.kv_cache.num_attended_tokens
    parts = {name: None if share is None else seconds * share for name, share in profiled["shares"].items()}
    flops = forward_flops(options.size, options.num_devices, num_keys)
    rate = sum(flops.values()) / seconds
    return {
        "kv_cache_bytes": cache_bytes,
        "forward": {"seconds": seconds, **parts},
        "forward_host_seconds": host_seconds,
        "forward_kernels": profiled["kernels"],
        "attention_kernels": profiled["attention_kernels"],
        "forward_flops": sum(flops.values()),
        "forward_flops_per_second": rate,
        "forward_to_matmul": rate / matmul,
        "part_flops": flops,
        "part_to_matmul": {
            name: work / part / matmul if (part := parts[name]) else None for name, work in flops.items()
        },
    }


def waits_per_chunk(setup: Setup) -> int | None:
    """Return how often the host waits for the GPU in a chunk at the full window, from its noise to its latents, with
    the clean pass of the chunk before; None on a CPU."""
    if setup.device.type != "cuda":
        return None
    num_chunks = setup.size.chunks_to_fill + 1
    with setup.stream(num_chunks + 1, output_type="latent") as session:  # the last chunk of a video has no clean pass
        for _ in islice(session, num_chunks - 1):
            pass
        return count_waits(lambda: next(session), setup.device)
