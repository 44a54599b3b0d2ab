"""How much work a rank has in teacher forcing: Balanced SP beside cutting `[clean; noisy]` into equal pieces."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from longlive_diffusers.parallel import FrameLayout


@dataclass(frozen=True)
class RankWork:
    """
    What one rank has to do in one teacher-forcing step.

    Args:
        tokens: Tokens it owns, clean and noisy: work of all layers but attention.
        loss_tokens: Those of them that bear a loss, the noisy ones.
        pairs: Pairs (query, key) that the mask allows, over its own queries and everybody's keys: the attention of a
            rank that keeps all heads of its queries, as in ring attention. Later frames see more, so that neither
            split balances these. With Ulysses' all-to-all a rank has a share of the heads and all queries: everyone
            computes the mean of these numbers, however the clip is split.
        frames: Latent frames it needs in either copy, thus reads and encodes.
    """

    tokens: int
    loss_tokens: int
    pairs: int
    frames: int


def balanced_work(layout: FrameLayout, frame_tokens: int) -> list[RankWork]:
    """The work of each rank under Balanced SP, where it owns the clean and the noisy tokens of its frames."""
    parts = (range(layout.num_chunks)[layout.chunks_of(rank)] for rank in range(layout.num_ranks))
    return [_work(layout, frame_tokens, clean=chunks, noisy=chunks) for chunks in parts]


def plain_work(layout: FrameLayout, frame_tokens: int) -> list[RankWork]:
    """The work of each rank if `[clean; noisy]` is cut into N equal pieces."""
    size, chunks = 2 * layout.chunks_per_rank, layout.num_chunks
    sequence = range(2 * chunks)  # the clean chunks, then the noisy ones
    parts = (sequence[rank * size : (rank + 1) * size] for rank in range(layout.num_ranks))
    return [
        _work(
            layout,
            frame_tokens,
            clean=[place for place in part if place < chunks],
            noisy=[place - chunks for place in part if place >= chunks],
        )
        for part in parts
    ]


def imbalance(work: Iterable[int]) -> float:
    """Largest over mean: how many times longer the busiest rank works than if all worked alike."""
    work = list(work)
    return float(Fraction(max(work) * len(work), sum(work)))


def _work(layout: FrameLayout, frame_tokens: int, clean: Iterable[int], noisy: Iterable[int]) -> RankWork:
    clean, noisy = list(clean), list(noisy)
    chunk_tokens = layout.chunk_size * frame_tokens
    # Chunk b sees b + 1 chunks in either copy: 0..b, its own being clean for a clean one and noisy for a noisy one.
    pairs = sum(chunk + 1 for chunk in clean + noisy) * chunk_tokens**2
    return RankWork(
        tokens=len(clean + noisy) * chunk_tokens,
        loss_tokens=len(noisy) * chunk_tokens,
        pairs=pairs,
        frames=len({*clean, *noisy}) * layout.chunk_size,
    )
