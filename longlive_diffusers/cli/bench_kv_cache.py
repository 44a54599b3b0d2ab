"""What it costs, and saves, to store keys and values in fewer bits."""

import statistics

import torch

from ..pipelines.pipeline_longlive import LongLivePipeline
from .bench_runs import measure_denoise
from .bench_sizes import BenchSize
from .measure import as_size


ROUNDS = 2


def measure_kv_caches(
    pipe: LongLivePipeline, size: BenchSize, embeds: torch.Tensor, device: torch.device, kinds: list[str]
) -> dict[str, dict[str, float]]:
    """
    Denoise whole videos with each kind of cache, in turns, so that a machine that slows down slows all.

    Args:
        kinds: "plain" (the network's dtype), "bfloat16", "fp8" or "nvfp4".

    Returns:
        For each: `chunk`, seconds of a chunk at the full window (median); `early` and `late`, the same for the first
        and the second half of these chunks; `bytes` of the cache, what is unpacked included.
    """
    seconds: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    sizes: dict[str, int] = {}
    for _ in range(ROUNDS):
        for kind in kinds:
            dtype = {"plain": None, "bfloat16": torch.bfloat16}.get(kind, kind)
            times, _, sizes[kind] = measure_denoise(pipe, size, embeds, device, size.num_chunks, kv_cache_dtype=dtype)
            seconds[kind].append(times[size.chunks_to_fill :])
    results = {}
    for kind in kinds:
        half = len(seconds[kind][0]) // 2
        results[kind] = {
            "chunk": statistics.median(time for times in seconds[kind] for time in times),
            "early": statistics.median(time for times in seconds[kind] for time in times[:half]),
            "late": statistics.median(time for times in seconds[kind] for time in times[half:]),
            "bytes": sizes[kind],
        }
    return results


def kv_cache_rows(results: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
    """Lines of the table: each kind beside the first."""
    first, rows = next(iter(results), None), []
    for kind, result in results.items():
        compared = "" if kind == first else f"{result['chunk'] / results[first]['chunk']:.2f} of {first}'s; "
        rows.append(
            (
                f"cache {kind}",
                f"{1000 * result['chunk']:.1f} ms",
                f"denoise a chunk at full window: {compared}second half {result['late'] / result['early']:.2f} of the "
                f"first; {as_size(result['bytes'])}",
            )
        )
    return rows
