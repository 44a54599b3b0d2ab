"""How tokens attend: over the cache when streaming, over allowed chunks when training, over the text of their chunk.

Masks of this model are made of whole chunks, so none is ever built for a dense kernel: each chunk's queries attend, in
one unmasked call, to exactly the keys they may see. That works with every backend of `dispatch_attention_fn`, has a
backward on every device, and computes no score that a mask would throw away. FlexAttention (backend "flex") takes the
same rule as a block mask instead; it needs a GPU for the backward.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask

from ..parallel.all_to_all import gather_heads, scatter_heads
from .layer_kv_cache import ChunkPlan, LayerKVCache, PackedLayerKVCache
from .rotary import apply_rotary


_SCORE_BYTES = 16 * 2**20  # of a block of scores; larger allocations go back to the system each time, which costs more


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
        """Chunk-wise attention; all tensors `[B, tokens, heads, head_dim]`."""
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
        """The same rule for FlexAttention."""
        return _block_mask(self, device)

    def allows(self, query_token: torch.Tensor, key_token: torch.Tensor) -> torch.Tensor:
        """The rule itself, on token indices."""
        query_chunk, query_noisy = self._place(query_token // self.chunk_tokens)
        key_chunk, key_noisy = self._place(key_token // self.chunk_tokens)
        if not self.has_clean:
            return key_chunk <= query_chunk
        own_chunk = (key_chunk == query_chunk) & (key_noisy == query_noisy)
        return own_chunk | ((key_chunk < query_chunk) & ~key_noisy)

    def _place(self, index):
        """Of the `index`-th run of `chunk_tokens` tokens (a number or a tensor): its chunk, and whether it is noisy
        beside a clean half."""
        chunks = self.chunks_per_rank
        per_rank = self.num_halves * chunks
        return index // per_rank * chunks + index % chunks, index % per_rank >= chunks

    def _past(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens that later chunks see, in the order of chunks: the clean ones, if there are any.

        Gathered once: a copy only where several ranks' noisy tokens lie between them.
        """
        return states.unflatten(1, (self.num_ranks, self.num_halves, -1))[:, :, 0].flatten(1, 2)


def prefixes(states: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """The first 0, 1, 2, ... chunks of `size` tokens of `[B, tokens, ...]`, views."""
    if _in_plain_autograd():
        return _Prefixes.apply(states, size)
    return tuple(states[:, :stop] for stop in range(0, states.shape[1] + 1, size))


class _Prefixes(torch.autograd.Function):
    """Their gradients are summed in one buffer; those of slices made one by one each fill a whole one with zeros."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
        ctx.shape = states.shape
        ctx.set_materialize_grads(False)
        return tuple(states[:, :stop] for stop in range(0, states.shape[1] + 1, size))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor | None):
        given = [gradient for gradient in gradients if gradient is not None]
        total = given[0].new_zeros(ctx.shape)
        for gradient in given:
            total[:, : gradient.shape[1]] += gradient
        return total, None


@functools.lru_cache(maxsize=8)
def _block_mask(mask: ChunkMask, device: torch.device) -> BlockMask:
    """Made of the rule on whole chunks: on all pairs of tokens, for 96 frames of 704x1280, it would take 28 GB.

    A block of 128 tokens lies in one chunk or straddles several. It sees another in full where all chunks of the one
    see all of the other, in part where some do.
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
    """Of the blocks that each query block sees, `[blocks, blocks]`: how many, and which, these first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32)[None, None], order[None, None]


class LongLiveAttnProcessor:
    """Self-attention (streaming or masked by chunks) and cross-attention to the text, for `WanAttention` modules.

    Which of them a call is depends on its arguments alone.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: ChunkMask | None = None,
        rotary_emb: torch.Tensor | None = None,
        layer_cache: LayerKVCache | PackedLayerKVCache | None = None,
        plan: ChunkPlan | None = None,
        sp_mesh: DeviceMesh | None = None,
    ) -> torch.Tensor:
        """
        Args:
            attn: The module whose projections are used.
            hidden_states: `[B, tokens, dim]`.
            encoder_hidden_states: Projected text, `[B, L, dim]`, or per chunk `[B, chunks, L, dim]`: cross-attention.
            attention_mask: Rule of self-attention without a cache.
            rotary_emb: Rotation of queries and keys of self-attention.
            layer_cache, plan: Cache of this layer and the chunk's place in it; of cross-attention, where the text's
                keys and values are kept.
            sp_mesh: Ranks that hold the other frames of the clip, for self-attention without a cache; `hidden_states`
                are this rank's tokens, and `attention_mask` is the rule of all tokens in natural order.

        Returns:
            `[B, tokens, dim]`.
        """
        if attn.is_cross_attention:
            states = self._attend_to_text(attn, hidden_states, encoder_hidden_states, attention_mask, layer_cache)
        else:
            states = self._attend_to_frames(
                attn, hidden_states, attention_mask, rotary_emb, layer_cache, plan, sp_mesh
            )
        states = states.flatten(2, 3).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](states))

    def _attend_to_frames(self, attn, hidden_states, attention_mask, rotary_emb, layer_cache, plan, sp_mesh):
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = split_heads(attn, attn.norm_q(query), attn.norm_k(key), value)
        raw_key = key
        query, key = apply_rotary(query, rotary_emb), apply_rotary(key, rotary_emb)

        if layer_cache is not None:
            key, value = layer_cache.update(key, value, raw_key, plan)
            return attend(query, key, value, self._attention_backend)
        if sp_mesh is None:
            return self._attend_by_chunks(query, key, value, attention_mask)
        # Rotated before they travel: a rank needs the positions and the angles of its own frames only.
        query, key, value = scatter_heads(torch.stack([query, key, value], dim=2), sp_mesh).unbind(2)
        return gather_heads(self._attend_by_chunks(query, key, value, attention_mask), sp_mesh)

    def _attend_by_chunks(self, query, key, value, attention_mask):
        if self._attention_backend == AttentionBackendName.FLEX:
            mask = attention_mask.block_mask(query.device)
            return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        return attention_mask.dense(query, key, value, self._attention_backend)

    def _attend_to_text(self, attn, hidden_states, encoder_hidden_states, attention_mask, layer_cache):
        (query,) = split_heads(attn, attn.norm_q(attn.to_q(hidden_states)))
        if layer_cache is not None and not torch.is_grad_enabled():
            if layer_cache.text is None:
                text = project_text(attn, encoder_hidden_states)
                # Kept heads first, like the frames: each head's keys are then contiguous at every forward.
                layer_cache.text = tuple(states.transpose(1, 2).contiguous().transpose(1, 2) for states in text)
            return attend(query, *layer_cache.text, self._attention_backend)

        key, value = project_text(attn, encoder_hidden_states)
        if key.ndim == 4:
            return attend(query, key, value, self._attention_backend)
        # One text for each chunk of this rank: [B, halves * chunks * n, H, D] meets it as a batch of B * chunks.
        halves, chunks = attention_mask.num_halves, attention_mask.chunks_per_rank
        query = query.unflatten(1, (halves, chunks, -1)).transpose(1, 2)  # [B, chunks, halves, n, H, D]
        states = attend(
            query.flatten(2, 3).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), self._attention_backend
        )
        states = states.unflatten(0, (-1, chunks)).unflatten(2, (halves, -1))
        return states.transpose(1, 2).flatten(1, 3)


def split_heads(attn: WanAttention, *states: torch.Tensor) -> list[torch.Tensor]:
    """`[..., tokens, dim]` -> `[..., tokens, heads, head_dim]`."""
    return [x.unflatten(-1, (attn.heads, -1)) for x in states]


def project_text(attn: WanAttention, text: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values `[..., L, heads, head_dim]` of projected text `[..., L, dim]`."""
    if attn.fused_projections:
        key, value = attn.to_kv(text).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(text), attn.to_v(text)
    return split_heads(attn, attn.norm_k(key), value)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """Unmasked attention, `[B, tokens, heads, head_dim]`, by `backend` (None: diffusers' active one)."""
    if backend is None and _prefers_matmul(query):
        return _matmul_attention(query, key, value)
    return dispatch_attention_fn(query, key, value, backend=backend)


def attend_joined(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], backend: str | None = None
) -> torch.Tensor:
    """[`attend`] to the concatenation of `keys` and of `values` along tokens, which the backward does not keep."""
    keys, values = ([part for part in parts if part.shape[1]] for parts in (keys, values))
    if len(keys) == 1:
        return attend(query, *keys, *values, backend)
    key, value = _join(keys), _join(values)
    if not _in_plain_autograd():
        return attend(query, key, value, backend)
    with _save_parts_of({_storage(key): keys, _storage(value): values}):
        return attend(query, key, value, backend)


@dataclass(frozen=True)
class _Joined:
    """Stands in the graph for a view of a concatenation along tokens: what it was made of, and which view."""

    parts: list
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def _save_parts_of(parts: dict[int, list[torch.Tensor]]) -> Iterator[None]:
    """
    Save, for backward, the parts of concatenated tensors (found by their storage) in place of these, and concatenate
    them again when they are needed: the same bits, and no attention is computed twice.

    A clip of n chunks is concatenated n times, each time with all the history so far; kept, that would be O(n^2)
    memory, where the parts are slices of tensors that other nodes of the graph keep anyway. Everything that is saved
    still goes through the hooks that were there before (gradient checkpointing is a pair of them, and would keep all
    of a layer if a pair in front of it took the tensors away), which is why these are looked up.
    """
    outer_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack, outer_unpack = outer_hooks or (_identity, _identity)

    def pack(tensor: torch.Tensor):
        if _storage(tensor) not in parts:
            return outer_pack(tensor)
        packed = [outer_pack(part.detach()) for part in parts[_storage(tensor)]]
        return _Joined(packed, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(saved) -> torch.Tensor:
        if not isinstance(saved, _Joined):
            return outer_unpack(saved)
        whole = _join([outer_unpack(part) for part in saved.parts])
        return whole.as_strided(saved.size, saved.stride, saved.offset)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        parts.clear()  # the graph may keep `pack`, which must not keep them


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Along tokens; contiguous, so that a view's strides mean the same again whatever those of the parts are then."""
    return torch.cat(parts, dim=1).contiguous()


def _in_plain_autograd() -> bool:
    """Not where a compiler decides what is saved, where nothing is, or under a transform of `torch.func`, which
    forbids hooks and needs more of a function than a backward."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()
    )


def _storage(tensor: torch.Tensor) -> int:
    """Which storage it is a view of; unlike an address, of its own on the meta device too."""
    return tensor.untyped_storage()._cdata


def _identity(saved):
    return saved


def _prefers_matmul(query: torch.Tensor) -> bool:
    """On a CPU without AMX, PyTorch's fused bfloat16 attention multiplies at float32 speed; matrix products do not.

    What they cost is that scores are rounded to bfloat16, as everything around them is.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    )


@torch.library.custom_op("longlive_diffusers::matmul_attention", mutates_args=())
def _matmul_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention in blocks of heads and queries, whose scores share one buffer that is small enough to be reused.

    An operator of its own, so that `torch.compile` leaves it as it is: it cannot trace the shared buffer, and what it
    makes of the same products without one was slower, by itself, at the benchmark's shape.
    """
    batch, num_queries, heads, head_dim = query.shape
    scaled = query * head_dim**-0.5
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (scaled, key, value))  # [B * heads, ...]
    row_bytes = key.shape[1] * key.element_size()
    num_rows = min(num_queries, max(1, _SCORE_BYTES // row_bytes))
    num_heads = min(batch * heads, max(1, _SCORE_BYTES // (row_bytes * num_rows)))
    buffer = query.new_empty(num_heads * num_rows * key.shape[1])
    output = query.new_empty(query.shape)
    blocks = zip(*(states.split(num_heads) for states in (query, key, value, output)), strict=True)
    for queries, keys, values, outputs in blocks:
        for rows, result in zip(queries.split(num_rows, dim=1), outputs.split(num_rows, dim=1), strict=True):
            shape = (*rows.shape[:2], keys.shape[1])
            scores = buffer[: math.prod(shape)].view(shape)
            torch.bmm(rows, keys.transpose(1, 2), out=scores)
            torch.softmax(scores, dim=-1, out=scores)
            torch.bmm(scores, values, out=result)
    return output.unflatten(0, (batch, heads)).transpose(1, 2).contiguous()


@_matmul_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)
