"""Two settings measured in turns, in one process, so that other load on the machine affects both alike."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import repeat
from typing import Any

from ..dtypes import dtype_name
from .options import BenchOptions
from .ratios import PairedRatio, in_turns
from .report import LogStage, Share, matmul_rates, measure_one_forward, weights
from .runs import (
    decoded_chunks,
    denoised_chunks,
    full_window_forward,
    measure_denoise,
    measure_whole,
    timed,
    warm_up,
)
from .setup import Setup, build


Turn = Callable[[], dict[str, float]]
Pair = tuple[dict[str, float], dict[str, float]]
"""Seconds by name, of the first setting and of the second."""

FORWARDS = 3  # of one turn, the fastest of which counts: a forward is short beside what else a machine does


def compare(
    first: BenchOptions, second: BenchOptions, rounds: int, log_stage: LogStage, share: Share
) -> Iterator[dict[str, Any]]:
    """
    Measure two settings in turns.

    Args:
        first, second: The settings.
        rounds: How often each is measured.
        log_stage, share: See [`measurements`].

    Yields:
        The results of each stage, by name: of each setting what is measured once, as in [`measurements`], in `once`;
        and of each quantity its [`PairedRatio`], in `ratios`.
    """
    log_stage("the device's matrix products")
    same_device = first.device == second.device
    matmul = [matmul_rates(first, second)] * 2 if same_device else [matmul_rates(first), matmul_rates(second)]
    if same_device:
        yield {"matmul_flops_per_second": matmul[0]}
    log_stage("building the networks, twice")
    setups = build(first), build(second)
    for setup in setups:
        share(setup.pipe)
    once: list[dict[str, Any]] = []
    for options, setup, rates in zip((first, second), setups, matmul, strict=True):
        log_stage("warming up")
        warm_up(setup, is_compiled=options.compile)
        own_rates = {} if same_device else {"matmul_flops_per_second": rates}
        forward = measure_one_forward(setup, options, rates[dtype_name(options.dtype)])
        once.append({"weights_bytes": weights(setup), **own_rates, **forward})
    yield {"once": once}
    ratios: dict[str, dict[str, Any]] = {}
    stages = {
        "one forward": _forwards(*setups, rounds),
        "denoising": _denoised(*setups, rounds),
        "decoding": _decoded(*setups, rounds),
        "whole videos": _whole(*setups, rounds, async_decode=False),
        "whole videos, decoded asynchronously": _whole(*setups, rounds, async_decode=True),
    }
    for stage, measured in stages.items():
        log_stage(f"{stage}, in turns")
        pairs: list[Pair] = []
        for pair in measured:
            pairs.append(pair)
            for name in pair[0]:
                ratios[name] = PairedRatio([a[name] for a, _ in pairs], [b[name] for _, b in pairs]).as_dict()
            yield {"ratios": dict(ratios)}


def _forwards(first: Setup, second: Setup, rounds: int) -> Iterator[Pair]:
    with full_window_forward(first) as forward, full_window_forward(second) as other_forward:
        yield from in_turns(
            lambda: {"forward": min(timed(forward, first.device) for _ in range(FORWARDS))},
            lambda: {"forward": min(timed(other_forward, second.device) for _ in range(FORWARDS))},
            rounds,
        )


def _denoised(first: Setup, second: Setup, rounds: int) -> Iterator[Pair]:
    with ExitStack() as stack:

        def next_chunks(setup: Setup) -> Turn:
            filling = setup.size.chunks_to_fill - 1
            chunks = stack.enter_context(closing(denoised_chunks(setup, filling + rounds)))
            for _ in range(filling):
                next(chunks)
            return lambda: {"denoise": next(chunks)[0]}

        yield from in_turns(next_chunks(first), next_chunks(second), rounds)


def _decoded(first: Setup, second: Setup, rounds: int) -> Iterator[Pair]:
    def next_chunks(setup: Setup) -> Turn:
        _, (latents,) = measure_denoise(setup, 1)
        chunks = decoded_chunks(setup, repeat(latents))
        next(chunks)  # the first has fewer frames
        return lambda: {"decode": next(chunks)}

    yield from in_turns(next_chunks(first), next_chunks(second), rounds)


def _whole(first: Setup, second: Setup, rounds: int, *, async_decode: bool) -> Iterator[Pair]:
    how = "asynchronous" if async_decode else "synchronous"

    def turn(setup: Setup) -> dict[str, float]:
        result = measure_whole(setup, async_decode=async_decode)
        return {
            f"{how} video": result["seconds"],
            f"{how} first frame": result["latency"]["first_frame"],
            f"{how} between chunks": result["latency"]["between_chunks_median"],
        }

    yield from in_turns(partial(turn, first), partial(turn, second), rounds)
