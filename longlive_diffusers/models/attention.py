"""The attention of the transformer: to the KV cache when streaming, to the chunks that the mask allows when training,
and to the prompt embeddings of each chunk."""

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..fp8.rows import FP8Rows
from ..fused.layers import is_plain
from ..fused.rotation import can_norm_rotate_and_write, norm_rotate_and_write
from ..nvfp4.together import apply_together
from ..parallel.all_to_all import gather_heads, scatter_heads
from ..parallel.head_exchange import HeadExchange
from .attend import attend
from .chunk_history import ChunkHistory
from .chunk_mask import ChunkMask
from .flex import flex_attend
from .layer_kv_cache import ChunkSlots, LayerCacheBase, PackedLayerKVCache
from .lean_norms import rms_norm
from .rotary import apply_rotary


class LongLiveAttnProcessor:
    """Self-attention (streaming or masked by chunks) and cross-attention to the prompt, for `WanAttention` modules.

    Which of these a call computes depends on its arguments alone.
    """

    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor | FP8Rows,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: ChunkMask | None = None,
        rotary_emb: torch.Tensor | None = None,
        layer_cache: LayerCacheBase | ChunkHistory | None = None,
        chunk: ChunkSlots | None = None,
        sp_mesh: DeviceMesh | None = None,
        exchange: HeadExchange | None = None,
    ) -> torch.Tensor:
        """
        Args:
            attn: The module whose projections are used.
            hidden_states: The hidden states of the tokens, `[B, tokens, dim]`; in FP8 where the [`first_layers`] take
                them so.
            encoder_hidden_states: The projected prompt embeddings, `[B, L, dim]`, or one prompt for each chunk,
                `[B, chunks, L, dim]`, for cross-attention.
            attention_mask: Which chunks see which, for self-attention without a cache; cross-attention takes the
                number of chunks from it.
            rotary_emb: The rotation of the queries and keys of self-attention.
            layer_cache, chunk: The cache of this layer, or in a forward with gradients its history, and the chunk's
                place in it; in cross-attention, the cache keeps the keys and values of the prompt.
            sp_mesh: The ranks that hold the other frames of the clip, for self-attention without a cache;
                `hidden_states` are then this rank's tokens, and `attention_mask` is for all tokens in natural order.
            exchange: How the ranks that share a stream exchange heads, for self-attention with a cache, which then
                holds this rank's heads; `hidden_states` are the tokens of this rank's frames.

        Returns:
            The attended hidden states, `[B, tokens, dim]`.
        """
        if attn.is_cross_attention:
            states = self._attend_to_text(attn, hidden_states, encoder_hidden_states, attention_mask, layer_cache)
        else:
            states = self._attend_to_frames(
                attn, hidden_states, attention_mask, rotary_emb, layer_cache, chunk, sp_mesh, exchange
            )
        states = states.flatten(2, 3).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](states))

    def _attend_to_frames(
        self, attn, hidden_states, attention_mask, rotary_emb, layer_cache, chunk, sp_mesh, exchange
    ):
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = apply_together((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        is_cached = isinstance(layer_cache, LayerCacheBase) and exchange is None
        can_write = is_cached and can_norm_rotate_and_write(attn.norm_q, attn.norm_k, query)
        if can_write and (destination := layer_cache.destination(chunk)) is not None:
            query = norm_rotate_and_write(query, key, value, attn.norm_q, attn.norm_k, rotary_emb, destination)
            return layer_cache.attend_to_visible(query, chunk, self._attention_backend)
        query, key = rms_norm(attn.norm_q, query), rms_norm(attn.norm_k, key)
        query, key, value = split_heads(attn, query, key, value)
        if exchange is not None and exchange.sends_codes and is_stored_as_sent(layer_cache, chunk):
            return self._attend_to_codes(query, key, value, rotary_emb, layer_cache, chunk, exchange)
        if exchange is not None:  # before the rotation, because the cache also keeps unrotated keys
            query, key, value = exchange.own_heads(torch.stack([query, key, value], dim=2)).unbind(2)
        raw_key = key
        query, key = apply_rotary(query, rotary_emb), apply_rotary(key, rotary_emb)

        if layer_cache is not None:
            states = layer_cache.attend(query, key, value, raw_key, chunk, self._attention_backend)
            return states if exchange is None else exchange.all_heads(states)
        if sp_mesh is None:
            return self._attend_by_chunks(query, key, value, attention_mask)
        # Rotated before the exchange, so that a rank needs the positions and angles of its own frames only.
        query, key, value = scatter_heads(torch.stack([query, key, value], dim=2), sp_mesh).unbind(2)
        return gather_heads(self._attend_by_chunks(query, key, value, attention_mask), sp_mesh)

    def _attend_to_codes(self, query, key, value, rotary_emb, layer_cache, chunk, exchange):
        """Exchange the keys and values of a finished chunk as the cache will keep them, rotated and in few bits."""
        own_rotary = exchange.own_frames(rotary_emb, 1)
        num_frames = chunk.num_frames // exchange.size
        packed = layer_cache.pack(apply_rotary(key, own_rotary), value, num_frames)
        query = apply_rotary(exchange.own_heads(query), rotary_emb)
        states = layer_cache.attend_to_packed(query, exchange.own_bytes(packed), chunk, self._attention_backend)
        return exchange.all_heads(states)

    def _attend_by_chunks(self, query, key, value, attention_mask):
        if self._attention_backend == AttentionBackendName.FLEX:
            return flex_attend(query, key, value, attention_mask.block_mask(query.device))
        return attention_mask.dense(query, key, value, self._attention_backend)

    def _attend_to_text(self, attn, hidden_states, encoder_hidden_states, attention_mask, layer_cache):
        (query,) = apply_together((attn.to_q,), hidden_states)
        (query,) = split_heads(attn, rms_norm(attn.norm_q, query))
        if layer_cache is not None and not torch.is_grad_enabled():
            if layer_cache.text is None:
                text = project_text(attn, encoder_hidden_states)
                # Stored heads first, like the frames: each head's keys are then contiguous in every forward.
                layer_cache.text = tuple(states.transpose(1, 2).contiguous().transpose(1, 2) for states in text)
            key, value = layer_cache.text
            return attend(query, key, value, self._attention_backend, layer_cache.scratch)

        key, value = project_text(attn, encoder_hidden_states)
        if key.ndim == 4:
            return attend(query, key, value, self._attention_backend)
        # Each chunk of this rank has a prompt: queries [B, halves * chunks * n, H, D] become a batch of B * chunks.
        halves, chunks = attention_mask.num_halves, attention_mask.chunks_per_rank
        query = query.unflatten(1, (halves, chunks, -1)).transpose(1, 2)  # [B, chunks, halves, n, H, D]
        states = attend(
            query.flatten(2, 3).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), self._attention_backend
        )
        states = states.unflatten(0, (-1, chunks)).unflatten(2, (halves, -1))
        return states.transpose(1, 2).flatten(1, 3)


def first_layers(attn: WanAttention, device: torch.device) -> tuple[nn.Module, ...]:
    """Return the layers that read the hidden states of an attention module, if nothing else does: nothing is around
    it, and it is computed here."""
    is_usual = is_plain(attn, WanAttention, device) and type(attn.processor) is LongLiveAttnProcessor
    if not is_usual or (attn.fused_projections and not attn.is_cross_attention):
        return ()
    return (attn.to_q,) if attn.is_cross_attention else (attn.to_q, attn.to_k, attn.to_v)


def is_stored_as_sent(layer_cache: object, chunk: ChunkSlots | None) -> bool:
    """Whether a chunk's keys and values are to be kept in few bits, and nothing else of them."""
    is_finished = chunk is not None and chunk.finished
    return is_finished and isinstance(layer_cache, PackedLayerKVCache) and layer_cache.can_receive


def split_heads(attn: WanAttention, *states: torch.Tensor) -> list[torch.Tensor]:
    """Split `[..., tokens, dim]` into `[..., tokens, heads, head_dim]`."""
    return [x.unflatten(-1, (attn.heads, -1)) for x in states]


def project_text(attn: WanAttention, text: torch.Tensor) -> list[torch.Tensor]:
    """Return the keys and values `[..., L, heads, head_dim]` of projected prompt embeddings `[..., L, dim]`."""
    if attn.fused_projections:
        key, value = attn.to_kv(text).chunk(2, dim=-1)
    else:
        key, value = apply_together((attn.to_k, attn.to_v), text)
    return split_heads(attn, rms_norm(attn.norm_k, key), value)
