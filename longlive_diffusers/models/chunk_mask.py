"""Which chunks see which in training, as dense attention chunk by chunk or as a block mask for FlexAttention.

Masks of this model are made of whole chunks, so none is ever built for a dense kernel: each chunk's queries attend, in
one unmasked call, to exactly the keys they may see. That works with every backend of `dispatch_attention_fn`, has a
backward on every device, and computes no score that a mask would discard. FlexAttention (backend "flex") takes the
same rule as a block mask instead; its backward needs a GPU.
"""

import functools
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask

from .attend import attend, attend_joined
from .saved_recipes import in_plain_autograd


@dataclass(frozen=True)
class ChunkMask:
    """Which chunks see which, for tokens `[clean; noisy]` (teacher forcing) or `[noisy]` alone (block causal).

    Teacher forcing: clean chunk b sees clean chunks 0..b; noisy chunk b sees clean chunks 0..b-1 and itself. Block
    causal: chunk b sees chunks 0..b. (LongLive-2.0, arXiv 2605.18739, teacher forcing with a clean history.)

    With `num_ranks` > 1 the tokens are those of several ranks in natural order, `[r0 clean, r0 noisy, r1 clean, ...]`:
    each has both halves of its own `num_chunks / num_ranks` chunks (Balanced SP, see `longlive_diffusers.parallel`).
    """

    num_chunks: int
    chunk_tokens: int
    has_clean: bool
    num_ranks: int = 1

    @property
    def num_halves(self) -> int:
        return 2 if self.has_clean else 1

    @property
    def chunks_per_rank(self) -> int:
        return self.num_chunks // self.num_ranks

    def dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend) -> torch.Tensor:
        """Compute attention chunk by chunk; all tensors are `[B, tokens, heads, head_dim]`."""
        size = self.chunk_tokens
        seen_keys, seen_values = (prefixes(self._past(states), size) for states in (key, value))
        own_queries, own_keys, own_values = (states.split(size, dim=1) for states in (query, key, value))
        outputs = []
        for index, own_query in enumerate(own_queries):
            chunk, is_noisy = self._place(index)
            if is_noisy:
                keys, values = [seen_keys[chunk], own_keys[index]], [seen_values[chunk], own_values[index]]
                outputs.append(attend_joined(own_query, keys, values, backend))
            else:
                outputs.append(attend(own_query, seen_keys[chunk + 1], seen_values[chunk + 1], backend))
        return torch.cat(outputs, dim=1)

    def block_mask(self, device: torch.device) -> BlockMask:
        """Return the same rule as a block mask for FlexAttention."""
        return _block_mask(self, device)

    def allows(self, query_token: torch.Tensor, key_token: torch.Tensor) -> torch.Tensor:
        """Whether a query token sees a key token, both given by index: the rule itself."""
        query_chunk, query_noisy = self._place(query_token // self.chunk_tokens)
        key_chunk, key_noisy = self._place(key_token // self.chunk_tokens)
        if not self.has_clean:
            return key_chunk <= query_chunk
        own_chunk = (key_chunk == query_chunk) & (key_noisy == query_noisy)
        return own_chunk | ((key_chunk < query_chunk) & ~key_noisy)

    def _place(self, index):
        """Return the chunk of the `index`-th run of `chunk_tokens` tokens (an integer or a tensor), and whether the
        run belongs to the noisy half of `[clean; noisy]` tokens."""
        chunks = self.chunks_per_rank
        per_rank = self.num_halves * chunks
        return index // per_rank * chunks + index % chunks, index % per_rank >= chunks

    def _past(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens that later chunks see, in the order of chunks: the clean ones, if there are any.

        They are gathered once, and copied only where the noisy tokens of several ranks lie between them.
        """
        return states.unflatten(1, (self.num_ranks, self.num_halves, -1))[:, :, 0].flatten(1, 2)


def prefixes(states: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Return the first 0, 1, 2, ... chunks of `size` tokens of `[B, tokens, ...]`, as views."""
    if in_plain_autograd():
        return _Prefixes.apply(states, size)
    return tuple(states[:, :stop] for stop in range(0, states.shape[1] + 1, size))


class _Prefixes(torch.autograd.Function):
    """Prefixes whose gradients are summed in one buffer; with plain slices, each would fill a full one with zeros. The
    sum has a term for every later chunk, so it is in float32."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
        ctx.shape = states.shape
        ctx.set_materialize_grads(False)
        return tuple(states[:, :stop] for stop in range(0, states.shape[1] + 1, size))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor | None):
        given = [gradient for gradient in gradients if gradient is not None]
        total = given[0].new_zeros(ctx.shape, dtype=torch.float32)
        for gradient in given:
            total[:, : gradient.shape[1]] += gradient
        return total.type_as(given[0]), None


@functools.lru_cache(maxsize=8)
def _block_mask(mask: ChunkMask, device: torch.device) -> BlockMask:
    """Build the block mask from the rule on whole chunks: on all pairs of tokens, it would take 28 GB for 96 frames of
    704x1280.

    A block of 128 tokens lies in one chunk or straddles several. It sees another block in full where all chunks of the
    one see all chunks of the other, and in part where some do.
    """
    runs = mask.num_chunks * mask.num_halves
    tokens, size = runs * mask.chunk_tokens, 128
    starts = torch.arange(runs, device=device) * mask.chunk_tokens
    sees = mask.allows(starts[:, None], starts[None]).float()  # [runs, runs]
    first = torch.arange(0, tokens, size, device=device)
    last = (first + size - 1).clamp(max=tokens - 1)
    touches = (
        (first[:, None] // mask.chunk_tokens <= starts // mask.chunk_tokens)
        & (starts // mask.chunk_tokens <= last[:, None] // mask.chunk_tokens)
    ).float()  # [blocks, runs]
    seen, pairs = touches @ sees @ touches.T, touches.sum(1)[:, None] * touches.sum(1)[None]
    is_whole = first + size <= tokens
    full = (seen == pairs) & is_whole[:, None] & is_whole[None]
    return BlockMask.from_kv_blocks(
        *_listed((seen > 0) & ~full),
        *_listed(full),
        BLOCK_SIZE=size,
        mask_mod=lambda batch, head, query_token, key_token: mask.allows(query_token, key_token),
        seq_lengths=(tokens, tokens),
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many blocks each query block of `[blocks, blocks]` sees, and all block indices, those in front."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32)[None, None], order[None, None]
