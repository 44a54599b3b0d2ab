"""Block-sparse attention over the cache: each head looks at the part of the history that matters to it.

Attention to a full window takes more than half of a forward's time at 704x1280, and most of its weight lies on few of
the keys. So the window is divided into blocks of neighboring tokens, and a chunk attends to

- all of its own tokens, all sinks, and the frames that opened the current shot, and
- of the rest of the history, the *density*-th part of the blocks: those that its queries point to most.

Which these are is estimated by means, for each head and for each strip of the picture by itself (a token mostly looks
at its own surroundings, in all frames): the mean query of a strip, over all frames of the chunk, against the mean key
of every block. What is chosen is copied together, and attended to like anything else, by whatever kernel does that
elsewhere: on every device, for every kind of cache, with one call for all strips and heads. With all blocks, it is the
dense attention itself.

Means as estimates of blocks: Quest (arXiv 2406.10774), MoBA (2502.13189), VSA (2505.13389).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from ..dtypes import float64_device
from ..number_checks import is_finite
from ..triton_launch import launch_from, uses_kernels
from .attend import attend


MOST_BLOCK_TOKENS = 64  # and at most a quarter of a frame
TILE = 4096  # numbers of a block that a program of the kernel copies
MOST_STRIPS = 2  # each copies what it chooses; a second one halves the error at low densities, more gain little


def check_density(attention_density: object) -> None:
    """Raise a ValueError unless it is a number above 0 and at most 1."""
    if not is_finite(attention_density) or not 0 < attention_density <= 1:
        raise ValueError(f"`attention_density` must be a number above 0 and at most 1, got {attention_density!r}.")


@dataclass(frozen=True)
class AttendedBlocks:
    """
    How much of the window a chunk attends to; the same for all layers.

    Args:
        is_always_seen: Which blocks are attended to in any case, boolean `[B, blocks]`.
        count: The number of blocks that are attended to, of each sample.
        size: The number of tokens of a block.
        strips: The number of strips of the picture that choose blocks by themselves.
        tokens: The number of tokens of a frame.
    """

    is_always_seen: torch.Tensor
    count: int
    size: int
    strips: int
    tokens: int


def plan_blocks(always_seen: Sequence[Sequence[bool]], tokens: int, density: float) -> AttendedBlocks | None:
    """
    Decide how many blocks a chunk attends to.

    Args:
        always_seen: Of each sample, for each filled slot, whether its frame is attended to in any case.
        tokens: The number of tokens of a frame.
        density: The part of all other blocks that is attended to; rounded up.

    Returns:
        The plan, on the CPU; None where every block is attended to. Samples may differ in how many frames they always
        see: all attend to as many blocks as the one that needs the most.
    """
    size = largest_divisor(tokens, min(MOST_BLOCK_TOKENS, max(1, tokens // 4)))
    per_frame = tokens // size
    counts = [per_frame * sum(seen) + math.ceil(density * per_frame * (len(seen) - sum(seen))) for seen in always_seen]
    count = max(counts)
    if count >= per_frame * len(always_seen[0]):
        return None
    is_always_seen = torch.tensor(always_seen).repeat_interleave(per_frame, dim=1)
    return AttendedBlocks(is_always_seen, count, size, largest_divisor(tokens, MOST_STRIPS), tokens)


def attend_to_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: AttendedBlocks,
    backend: AttentionBackendName | None = None,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Compute attention to the blocks that matter most to each head and strip.

    Args:
        query: The queries of whole frames, `[B, frames * tokens, heads, head_dim]`.
        key, value: What is cached, `[B, slots * tokens, heads, head_dim]`.
        blocks: How much of it is attended to.
        backend, scratch: See [`attend`].
    """
    by_strip = in_strips(query, blocks)
    key, value = take_chosen(key, value, choose_blocks(by_strip, key, blocks), blocks)
    attended = attend(by_strip, key, value, backend, scratch)
    return from_strips(attended, blocks, query.shape)


def choose_blocks(by_strip: torch.Tensor, key: torch.Tensor, blocks: AttendedBlocks) -> torch.Tensor:
    """Return the indices of the blocks that queries (see [`in_strips`]) choose, in ascending order, int64 `[B, strips,
    heads, count]`."""
    queries = by_strip.unflatten(0, (-1, blocks.strips))
    mean_query = queries.mean(dim=2, dtype=torch.float32)  # [B, strips, heads, head_dim]
    mean_key = in_blocks(key, blocks.size).mean(dim=3, dtype=torch.float32)  # [B, heads, blocks, head_dim]
    scores = torch.einsum("bshd,bhkd->bshk", mean_query, mean_key)
    scores = scores.masked_fill(blocks.is_always_seen[:, None, None], math.inf)
    return scores.topk(blocks.count, dim=-1, sorted=False).indices.sort(dim=-1).values


def take_chosen(
    key: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor, blocks: AttendedBlocks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the blocks that were chosen of keys and values `[B, slots * tokens, heads, head_dim]`; each `[B * strips,
    count * size, heads, head_dim]`."""
    if can_take_by_kernel(key, value):
        taken_key, taken_value = take_blocks_of_both(key, value, chosen, blocks.size)
        return taken_key.transpose(1, 2), taken_value.transpose(1, 2)
    return take_blocks(key, chosen, blocks.size), take_blocks(value, chosen, blocks.size)


def take_blocks(states: torch.Tensor, chosen: torch.Tensor, size: int) -> torch.Tensor:
    """Copy chosen blocks of `[B, slots * tokens, heads, head_dim]` to `[B * strips, count * size, heads, head_dim]`,
    where what one head reads is contiguous."""
    batch, _, heads, _ = states.shape
    samples = torch.arange(batch, device=states.device)[:, None, None, None]
    own_heads = torch.arange(heads, device=states.device)[None, None, :, None]
    rows = in_blocks(states, size).flatten(3)  # [B, heads, blocks, size * head_dim]
    taken = in_wide_numbers(rows)[samples, own_heads, chosen].view(states.dtype)  # [B, strips, heads, count, ...]
    return taken.unflatten(-1, (size, -1)).flatten(0, 1).flatten(2, 3).transpose(1, 2)


def can_take_by_kernel(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether [`take_blocks_of_both`] can take the place of [`take_blocks`]: what one head has is contiguous."""
    is_dense = all(states.stride(1) == states.shape[3] and states.stride(3) == 1 for states in (key, value))
    return is_dense and uses_kernels(key)


@torch.library.custom_op("longlive_diffusers::take_blocks", mutates_args=())
def take_blocks_of_both(
    key: torch.Tensor, value: torch.Tensor, chosen: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Copy chosen blocks of keys and values in one pass, on a GPU.

    Args:
        key, value: `[B, slots * tokens, heads, head_dim]`, where what one head has is contiguous.
        chosen: The indices of the blocks, int64 `[B, strips, heads, count]`.
        size: The number of tokens of a block.

    Returns:
        Those of the keys and of the values, `[B * strips, heads, count * size, head_dim]`.
    """
    batch, strips, heads, count = chosen.shape
    numbers = size * key.shape[3]
    taken = [states.new_empty(batch * strips, heads, count * size, states.shape[3]) for states in (key, value)]
    launch_from(
        f"{__package__}.block_kernels", "take_blocks_kernel", (chosen.numel(), -(-numbers // TILE)), key,
        key, value, chosen.contiguous(), *taken, key.stride(0), key.stride(2), value.stride(0), value.stride(2),
        strips, heads, count, numbers, TILE=TILE,
    )  # fmt: skip
    return taken[0], taken[1]


@take_blocks_of_both.register_fake
def _(key, value, chosen, size) -> tuple[torch.Tensor, torch.Tensor]:
    batch, strips, heads, count = chosen.shape
    shape = (batch * strips, heads, count * size, key.shape[3])
    return key.new_empty(shape), value.new_empty(shape)


def in_wide_numbers(rows: torch.Tensor) -> torch.Tensor:
    """View rows as numbers of 16 bytes, where they are made of such: indexing copies number by number, which takes a
    third or a quarter of the time then. The compiler has kernels of its own, and none for complex numbers."""
    if torch.compiler.is_compiling():
        return rows
    places = (*rows.stride()[:-1], rows.storage_offset(), rows.shape[-1])
    is_aligned = rows.stride(-1) == 1 and all(place * rows.itemsize % 16 == 0 for place in places)
    has_wide = is_aligned and float64_device(rows.device) == rows.device
    return rows.view(torch.complex128) if has_wide else rows


def in_blocks(states: torch.Tensor, size: int) -> torch.Tensor:
    """View `[B, slots * tokens, heads, head_dim]` as `[B, heads, blocks, size, head_dim]`."""
    return states.transpose(1, 2).unflatten(2, (-1, size))


def in_strips(query: torch.Tensor, blocks: AttendedBlocks) -> torch.Tensor:
    """`[B, frames * tokens, heads, head_dim]` -> `[B * strips, frames * tokens / strips, heads, head_dim]`."""
    by_frame = query.unflatten(1, (-1, blocks.strips, blocks.tokens // blocks.strips))
    return by_frame.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def from_strips(attended: torch.Tensor, blocks: AttendedBlocks, shape: torch.Size) -> torch.Tensor:
    """The inverse of [`in_strips`]."""
    by_strip = attended.unflatten(0, (-1, blocks.strips)).unflatten(2, (-1, blocks.tokens // blocks.strips))
    return by_strip.transpose(1, 2).reshape(shape)


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`."""
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)
