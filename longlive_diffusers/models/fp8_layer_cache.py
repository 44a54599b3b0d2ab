"""The KV cache of one layer for attention in FP8: keys and values are written as E4M3 by every forward, and attention
reads them as they lie.

Products of keys and queries in 8 bits leave room for one scale for all heads. So a head's scale goes into its queries,
`query * key_scale`, and that of its values into the result.
"""

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from ..fp8.e4m3 import from_codes, to_codes
from ..fused.decode import decode_heads
from ..fused.rotation import CodeFactors, Destination
from .attend import attend
from .cudnn_attention import cudnn_fp8_attention, has_cudnn_fp8
from .frame_store import Shape
from .layer_kv_cache import ChunkSlots, LayerCacheBase, allocate_slots, first_tokens
from .scaled_frames import ScaledFrames
from .sparse_attention import choose_blocks, from_strips, in_strips, take_chosen


QUERY_FACTOR = 16.0
"""Keys are at most 56 of their scales when these are chosen, and queries are about as large as keys: their codes are
then in the middle of what E4M3 has."""


class FP8LayerKVCache(LayerCacheBase):
    """Keys and values of one layer in E4M3, with the scales of the video's first forward.

    Where cuDNN cannot attend in FP8, its numbers are computed in the network's dtype, from codes that are unpacked in
    every forward. They differ by the rounding of softmax's weights. A forward with gradients attends to unrounded keys
    and values of its own chunk.
    """

    def __init__(self, shape: Shape, num_raw_slots: int, dtype: torch.dtype, device: torch.device):
        super().__init__(shape, num_raw_slots, dtype, device)
        self.key, self.value = (ScaledFrames(allocate_slots(shape, torch.uint8, device)) for _ in range(2))
        self._parts = (self.key, self.value)
        self._factors: CodeFactors | None = None  # when the first forward has chosen the scales

    def forget(self) -> None:
        """Choose other scales for the next video."""
        self._factors = None
        for stored in (self.key, self.value):
            stored.scale.zero_()

    def begin_chunk(self, length: int) -> None:
        """Make the first `length` slots visible."""
        self.visible = (first_tokens(self.key.codes, length), first_tokens(self.value.codes, length))

    def load(self) -> None:
        """Prepare for a forward of the chunk: nothing to do, because what is visible is the cache itself."""

    def store(self, chunk: ChunkSlots) -> None:
        """Keep what a forward of the chunk wrote: it is there, and the scales stay what they are."""
        if self._factors is None:
            keys, values = self.key.scale, self.value.scale
            self._factors = CodeFactors(keys * QUERY_FACTOR, keys.reciprocal(), values.reciprocal())

    def destination(self, chunk: ChunkSlots) -> Destination | None:
        """Where a fused kernel writes codes; None before there are scales."""
        if self._factors is None:
            return None
        keys, values = self.visible
        return Destination(keys, values, chunk.token_slots, self.raw_key, chunk.raw_slots, self._factors)

    def write(self, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor, chunk: ChunkSlots) -> None:
        """Write the chunk's keys and values, see [`LayerCacheBase.write`]."""
        index = (chunk.samples, slice(None), chunk.token_slots)
        for stored, states, new in zip((self.key, self.value), self.visible, (key, value), strict=True):
            # A compiled block does the same in every forward.
            if torch.compiler.is_compiling() or self._factors is None:
                stored.calibrate(new)
            states[index] = to_codes(new, stored.scale.reciprocal()[:, None, :, None])
        self._write_raw(raw_key, chunk)

    def attend_to_visible(
        self, query: torch.Tensor, chunk: ChunkSlots, backend: AttentionBackendName | None
    ) -> torch.Tensor:
        """Attend to what is cached; queries `[B, tokens, heads, head_dim]` may be codes already."""
        dtype = self._dtype
        if query.dtype != torch.uint8:
            dtype, query = query.dtype, to_codes(query, self.key.scale[:, None, :, None] * QUERY_FACTOR)
        key, value = (states.transpose(1, 2) for states in self.visible)
        if (blocks := chunk.blocks) is None:
            attended = attend_to_codes(query, key, value, dtype, backend, self.scratch)
        else:
            by_strip = in_strips(query, blocks)
            chosen = choose_blocks(from_codes(by_strip, dtype), from_codes(key, dtype), blocks)
            key, value = take_chosen(key, value, chosen, blocks)
            attended = attend_to_codes(by_strip, key, value, dtype, backend, self.scratch)
            attended = from_strips(attended, blocks, query.shape)
        return decode_heads(attended, self.value.scale, dtype)

    def _copy_visible(self, dtype: torch.dtype) -> list[torch.Tensor]:
        stored = (self.key, self.value)
        return [
            from_codes(codes, dtype).mul_(own.scale[..., None, None].to(dtype))
            for codes, own in zip(self.visible, stored, strict=True)
        ]


def attend_to_codes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dtype: torch.dtype,
    backend: AttentionBackendName | None,
    scratch: torch.Tensor | None,
) -> torch.Tensor:
    """
    Attend in E4M3.

    Args:
        query: Codes of queries times `QUERY_FACTOR`, uint8 `[B, tokens, heads, head_dim]`.
        key, value: Codes, uint8 `[B, length, heads, head_dim]`, in whose unit the result is.
        dtype: What is computed in where cuDNN does not do it.
        backend: The attention kernel; None: cuDNN's for FP8 where it can be had.
        scratch: See [`attend`].

    Returns:
        Codes, uint8 `[B, tokens, heads, head_dim]`.
    """
    head_dim = query.shape[-1]
    if backend is None and has_cudnn_fp8(query.device, head_dim):
        heads_first = (states.transpose(1, 2) for states in (key, value))
        return cudnn_fp8_attention(query, *heads_first, head_dim**-0.5 / QUERY_FACTOR)
    query, key, value = (from_codes(states, dtype) for states in (query, key, value))
    return to_codes(attend(query / QUERY_FACTOR, key, value, backend, scratch), 1.0)
