"""Measure what it costs, and saves, to store keys and values in fewer bits."""

import statistics
from collections.abc import Sequence

import torch

from ..pipelines.pipeline_longlive import LongLivePipeline
from .measure import as_size
from .runs import measure_denoise
from .sizes import BenchSize


ROUNDS = 2


def measure_kv_caches(
    pipe: LongLivePipeline, size: BenchSize, embeds: torch.Tensor, device: torch.device, dtypes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """
    Denoise whole videos with each kind of cache, in turns, so that a machine that slows down affects all kinds.

    Args:
        pipe, size, embeds, device: What to run, and where.
        dtypes: "auto" (the network's dtype), or names of `KV_CACHE_DTYPES`.

    Returns:
        For each dtype: `chunk`, the median seconds of a chunk at the full window; `early` and `late`, the same for the
        first and the second half of these chunks; `bytes`, the memory of the cache, including what is unpacked.
    """
    seconds: dict[str, list[list[float]]] = {dtype: [] for dtype in dtypes}
    num_bytes: dict[str, int] = {}
    for _ in range(ROUNDS):
        for dtype in dtypes:
            stored_as = None if dtype == "auto" else dtype
            times, _, num_bytes[dtype] = measure_denoise(
                pipe, size, embeds, device, size.num_chunks, kv_cache_dtype=stored_as
            )
            seconds[dtype].append(times[size.chunks_to_fill :])
    results = {}
    for dtype, runs in seconds.items():
        half = len(runs[0]) // 2
        results[dtype] = {
            "chunk": statistics.median(time for times in runs for time in times),
            "early": statistics.median(time for times in runs for time in times[:half]),
            "late": statistics.median(time for times in runs for time in times[half:]),
            "bytes": num_bytes[dtype],
        }
    return results


def kv_cache_rows(results: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
    """Return the lines of the table, in which each kind is compared with the first."""
    first, rows = next(iter(results), ""), []
    for dtype, result in results.items():
        compared = "" if dtype == first else f"{result['chunk'] / results[first]['chunk']:.2f} of {first}'s; "
        rows.append(
            (
                f"cache {dtype}",
                f"{1000 * result['chunk']:.1f} ms",
                f"denoise a chunk at full window: {compared}second half {result['late'] / result['early']:.2f} of the "
                f"first; {as_size(result['bytes'])}",
            )
        )
    return rows
