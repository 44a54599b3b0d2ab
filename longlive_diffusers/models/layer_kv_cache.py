"""The KV cache of one layer: keys and values of a streamed video, in the network's precision or in fewer bits."""

from dataclasses import dataclass

import torch

from ..dtypes import DTYPES
from .frame_store import FRAME_STORES, FrameStore, Shape
from .rotary import apply_rotary


KV_CACHE_DTYPES = (*DTYPES, *FRAME_STORES)
"""Every way to store keys and values, by name: a floating-point dtype, or a store in few bits."""


def resolve_kv_cache_dtype(dtype: torch.dtype | str, head_dim: int) -> torch.dtype | str:
    """
    Resolve what keys and values are stored as; the one place that decides what is possible.

    Args:
        dtype: A name in `KV_CACHE_DTYPES`, or a floating-point `torch.dtype` that one of them stands for.
        head_dim: The number of channels of an attention head.

    Returns:
        A `torch.dtype`, or the name of a store in few bits.

    Raises:
        ValueError: If keys and values cannot be stored as `dtype`, or not with this `head_dim`.
    """
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in FRAME_STORES:
        stores = " or ".join(map(repr, FRAME_STORES))
        raise ValueError(f"A KV cache is stored as {', '.join(DTYPES)}, {stores}, not as {dtype!r}.")
    if reason := FRAME_STORES[dtype].unsupported_reason(head_dim):
        raise ValueError(f"A KV cache in {dtype.upper()} {reason}.")
    return dtype


@dataclass(frozen=True)
class ChunkSlots:
    """Where the forwards of one chunk write and read; created once for each chunk, the same for all layers.

    `samples` and `slots` are int64 `[B, 1]` and `[B, num_frames]`: sample b's frames are written to `slots[b]`.
    `length` is the number of filled slots. `raw_samples`, `raw_frames`, `raw_slots` (int64 `[n]`, or None) name the
    frames of the chunk whose unrotated keys are kept as well. `finished` tells whether the latents are the clean ones,
    so that what the forward computes is what is remembered.
    """

    num_frames: int
    samples: torch.Tensor
    slots: torch.Tensor
    length: int
    rotary: torch.Tensor
    raw_samples: torch.Tensor | None = None
    raw_frames: torch.Tensor | None = None
    raw_slots: torch.Tensor | None = None
    finished: bool = False


class LayerCacheBase:
    """What both layer caches keep unpacked: keys and values of the text and, for relative RoPE, unrotated keys."""

    def __init__(self, shape: Shape, num_raw_slots: int, raw_dtype: torch.dtype, device: torch.device):
        raw_shape = (*shape[:2], num_raw_slots, *shape[3:])
        self.raw_key = torch.zeros(raw_shape, dtype=raw_dtype, device=device) if num_raw_slots else None
        self.text: tuple[torch.Tensor, torch.Tensor] | None = None

    def reset(self) -> None:
        """Forget the text; frames are forgotten by `KVCache.reset`, which owns their bookkeeping."""
        self.text = None

    def _keep_raw(self, raw_key: torch.Tensor, chunk: ChunkSlots) -> None:
        if self.raw_key is not None and chunk.raw_slots is not None:
            raw_frames = in_frames(raw_key, chunk.num_frames)[chunk.raw_samples, chunk.raw_frames]
            self.raw_key[chunk.raw_samples, :, chunk.raw_slots] = raw_frames.detach().to(self.raw_key.dtype)

    def _rotated(self, samples: torch.Tensor, raw_slots: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Return kept unrotated keys, `[n, heads, tokens, head_dim]`, rotated by `rotary`."""
        assert self.raw_key is not None  # `KVCache` keeps them for relative RoPE, and only then rotates again
        raw = self.raw_key[samples, :, raw_slots].transpose(1, 2)  # [n, tokens, heads, head_dim]
        return apply_rotary(raw, rotary).transpose(1, 2)


class LayerKVCache(LayerCacheBase):
    """Keys and values of one layer, `[B, heads, slots, tokens per frame, head_dim]`, preallocated.

    Heads come before slots so that what one head reads is contiguous. The attention processor and `KVCache` rely on
    this interface only; `PackedLayerKVCache` stores fewer bits behind the same interface.
    """

    def __init__(self, shape: Shape, num_raw_slots: int, dtype: torch.dtype, device: torch.device):
        super().__init__(shape, num_raw_slots, dtype, device)
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor, chunk: ChunkSlots
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the chunk's keys (rotated; `raw_key` unrotated) and values, and return everything that is cached.

        Args:
            key, value, raw_key: `[B, num_frames * tokens, heads, head_dim]`.
            chunk: Where this chunk's frames go.

        Returns:
            Keys and values `[B, length * tokens, heads, head_dim]`, in the dtype of `key`: views of the cache. With
            gradients enabled, copies: a backward needs them as they are now, and the next step overwrites the cache.
        """
        heads_first = [in_frames(states, chunk.num_frames) for states in (key, value)]
        self.key[chunk.samples, :, chunk.slots] = heads_first[0].detach().to(self.key.dtype)
        self.value[chunk.samples, :, chunk.slots] = heads_first[1].detach().to(self.value.dtype)
        self._keep_raw(raw_key, chunk)
        if torch.is_grad_enabled():
            index = (chunk.samples, slice(None), chunk.slots)
            cached = [states[:, :, : chunk.length].to(key.dtype, copy=True) for states in (self.key, self.value)]
            cached[0][index], cached[1][index] = heads_first
            return joined_tokens(cached[0]), joined_tokens(cached[1])
        return self.get(chunk.length, key.dtype)

    def get(self, length: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` slots, `[B, length * tokens, heads, head_dim]`: views of the cache
        (unless `dtype` differs from the cache's)."""
        key, value = (joined_tokens(states[:, :, :length]) for states in (self.key, self.value))
        return key.to(dtype or key.dtype), value.to(dtype or value.dtype)

    def rotate_again(
        self, samples: torch.Tensor, slots: torch.Tensor, raw_slots: torch.Tensor, rotary: torch.Tensor
    ) -> None:
        """Rotate kept unrotated keys (`samples`, `raw_slots`, int64 `[n]`) to `rotary` and store them in `slots`."""
        self.key[samples, :, slots] = self._rotated(samples, raw_slots, rotary)

    @property
    def num_bytes(self) -> int:
        """The memory of the stored keys and values, in bytes; those of the text are not counted."""
        return sum(buffer.nbytes for buffer in (self.key, self.value, self.raw_key) if buffer is not None)


class DequantBuffers:
    """The buffers that packed layers unpack into what a forward attends to: one pair for all layers, since these run
    one after the other."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        self._pairs: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}

    def of_dtype(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the buffers for keys and for values; they are allocated when first needed."""
        if dtype not in self._pairs:
            key, value = (torch.zeros(self.shape, dtype=dtype, device=self.device) for _ in range(2))
            self._pairs = {dtype: (key, value)}
        return self._pairs[dtype]

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for pair in self._pairs.values() for buffer in pair)


class PackedLayerKVCache(LayerCacheBase):
    """A [`LayerKVCache`] in NVFP4 or FP8.

    A chunk is quantized once, in the forward on its clean latents (`chunk.finished`); in the forwards before, it is
    attended to unquantized and not stored. The unrotated keys of sinks and pins that relative RoPE keeps are not
    quantized, so that a key that is rotated again is still quantized only once.
    """

    def __init__(
        self,
        shape: Shape,
        num_raw_slots: int,
        store: str,
        raw_dtype: torch.dtype,
        device: torch.device,
        dequant_buffers: DequantBuffers,
    ):
        super().__init__(shape, num_raw_slots, raw_dtype, device)
        self.key: FrameStore = FRAME_STORES[store](shape, device, for_keys=True)
        self.value: FrameStore = FRAME_STORES[store](shape, device, for_keys=False)
        self._dequant_buffers = dequant_buffers

    def update(
        self, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor, chunk: ChunkSlots
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the chunk and return everything that is cached, like [`LayerKVCache.update`], except that the views
        returned without gradients are of buffers that the next layer's update overwrites."""
        heads_first = [in_frames(states, chunk.num_frames) for states in (key, value)]
        cached = self._unpack(chunk.length, key.dtype)
        if torch.is_grad_enabled():
            cached = (cached[0].clone(), cached[1].clone())
        for states, new in zip(cached, heads_first, strict=True):
            states[chunk.samples, :, chunk.slots] = new
        if chunk.finished:
            self.key.write(chunk.samples, chunk.slots, heads_first[0].detach())
            self.value.write(chunk.samples, chunk.slots, heads_first[1].detach())
            self._keep_raw(raw_key, chunk)
        return joined_tokens(cached[0]), joined_tokens(cached[1])

    def get(self, length: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` slots as they were stored, `[B, length * tokens, heads, head_dim]`."""
        key, value = self._unpack(length, dtype or torch.float32)
        return joined_tokens(key).clone(), joined_tokens(value).clone()

    def rotate_again(
        self, samples: torch.Tensor, slots: torch.Tensor, raw_slots: torch.Tensor, rotary: torch.Tensor
    ) -> None:
        """Rotate kept unrotated keys and store them, like [`LayerKVCache.rotate_again`]."""
        self.key.write(samples, slots, self._rotated(samples, raw_slots, rotary))

    @property
    def num_bytes(self) -> int:
        """The memory of the stored keys and values, in bytes, without the [`DequantBuffers`] that all layers share."""
        raw = 0 if self.raw_key is None else self.raw_key.nbytes
        return self.key.num_bytes + self.value.num_bytes + raw

    def _unpack(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (buffer[:, :, :length] for buffer in self._dequant_buffers.of_dtype(dtype))
        self.key.read_into(key, length)
        self.value.read_into(value, length)
        return key, value


def in_frames(states: torch.Tensor, num_frames: int) -> torch.Tensor:
    """`[B, frames * tokens, heads, dim]` -> `[B, frames, heads, tokens, dim]`."""
    return states.unflatten(1, (num_frames, -1)).transpose(2, 3)


def joined_tokens(states: torch.Tensor) -> torch.Tensor:
    """`[B, heads, slots, tokens, dim]` -> `[B, slots * tokens, heads, dim]`."""
    return states.flatten(2, 3).transpose(1, 2)
