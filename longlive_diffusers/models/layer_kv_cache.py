"""The KV cache of one layer: keys and values of a streamed video, in the network's precision or in fewer bits."""

from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from ..dtypes import DTYPES
from ..fused.rotation import Destination
from .attend import attend
from .frame_store import (
    FRAME_STORES,
    KEYS,
    Frames,
    FrameStore,
    NVFP4Frames,
    Shape,
    put_frames,
    read_frames,
    take_frames,
)
from .rotary import apply_rotary
from .sparse_attention import AttendedBlocks, attend_to_blocks


FP8_ATTENTION = "fp8_attention"
"""The name of the cache in FP8 that attention reads as it lies, see `fp8_layer_cache.py`."""

KV_CACHE_DTYPES = (*DTYPES, *FRAME_STORES, FP8_ATTENTION)
"""Every way to store keys and values, by name: a floating-point dtype, a store in few bits, or `FP8_ATTENTION`."""


def resolve_kv_cache_dtype(dtype: torch.dtype | str, head_dim: int) -> torch.dtype | str:
    """
    Resolve what keys and values are stored as; the one place that decides what is possible.

    Args:
        dtype: A name in `KV_CACHE_DTYPES`, or a floating-point `torch.dtype` that one of them stands for.
        head_dim: The number of channels of an attention head.

    Returns:
        A `torch.dtype`, or the name of a store in few bits or of `FP8_ATTENTION`.

    Raises:
        ValueError: If keys and values cannot be stored as `dtype`, or not with this `head_dim`.
    """
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype in DTYPES.values() or dtype == FP8_ATTENTION:
        return dtype
    if not isinstance(dtype, str) or dtype not in FRAME_STORES:
        stores = " or ".join(map(repr, (*FRAME_STORES, FP8_ATTENTION)))
        raise ValueError(f"A KV cache is stored as {', '.join(DTYPES)}, {stores}, not as {dtype!r}.")
    if reason := FRAME_STORES[dtype].unsupported_reason(head_dim):
        raise ValueError(f"A KV cache in {dtype.upper()} {reason}.")
    return dtype


@dataclass(frozen=True)
class ChunkSlots:
    """Where the forwards of one chunk write; created once for each chunk, the same for all layers.

    `samples` and `slots` are int64 `[B, 1]` and `[B, num_frames]`: sample b's frames are written to `slots[b]`, its
    tokens to `token_slots[b]`, `[B, num_frames * tokens]`, where all slots' tokens are counted through.
    `length` is the number of slots that are filled then. `raw_slots`, in the shape of `slots`, are those of the
    unrotated keys (None where no layer keeps any). `rotary` is the rotation of the chunk's queries and keys.
    `finished` tells whether what the forward computes is what is remembered. `blocks` says how much is attended to;
    None: everything.
    """

    num_frames: int
    samples: torch.Tensor
    slots: torch.Tensor
    token_slots: torch.Tensor
    length: int
    rotary: torch.Tensor
    raw_slots: torch.Tensor | None = None
    finished: bool = False
    blocks: AttendedBlocks | None = None


class LayerCacheBase:
    """Keys and values of one layer, `[B, heads, slots, tokens per frame, head_dim]`, preallocated.

    Heads come before slots so that what one head reads is contiguous. The attention processor and `KVCache` rely on
    this interface only; the kinds of caches differ in how they store behind it.

    A block of the network uses `attend`, and the keys and values of the text. Only these run in a block, and they do
    the same for every chunk and every forward of it: a compiled block needs no graph of its own for any of them. What
    differs, `load` and `store`, runs before and after the block.
    """

    visible: tuple[torch.Tensor, torch.Tensor]
    """Keys and values of the filled slots, `[B, heads, length * tokens, head_dim]`, which are written in place."""
    scratch: torch.Tensor | None = None
    """What attention computes its scores in, shared by all layers, since these run one after the other."""
    _parts: tuple[Frames, Frames]
    """The stored keys and values."""

    def __init__(self, shape: Shape, num_raw_slots: int, dtype: torch.dtype, device: torch.device):
        self._shape, self._dtype, self._device = shape, dtype, device  # of what attention sees
        # One more slot than there are, for the keys that nobody will ask for.
        raw_shape = (*shape[:2], num_raw_slots + 1, *shape[3:])
        self.raw_key = torch.zeros(raw_shape, dtype=dtype, device=device) if num_raw_slots else None
        self.text: tuple[torch.Tensor, torch.Tensor] | None = None

    def reset(self) -> None:
        """Forget the text; frames are forgotten by `KVCache.reset`, which owns their bookkeeping."""
        self.text = None

    def forget(self) -> None:
        """Forget what is known of a video beside its frames: nothing."""

    def begin_chunk(self, length: int) -> None:
        """Make the first `length` slots visible."""
        raise NotImplementedError

    def load(self) -> None:
        """Prepare for a forward of the chunk."""
        raise NotImplementedError

    def store(self, chunk: ChunkSlots) -> None:
        """Keep what a forward of the chunk wrote."""
        raise NotImplementedError

    def get(self, length: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` slots as they were stored, `[B, length * tokens, heads, head_dim]`."""
        shape = (*self._shape[:2], length, *self._shape[3:])
        key, value = (torch.zeros(shape, dtype=dtype or torch.float32, device=self._device) for _ in range(2))
        for stored, target in zip(self._parts, (key, value), strict=True):
            read_frames(stored, target)
        return joined_tokens(key), joined_tokens(value)

    def rotate_again(
        self, samples: torch.Tensor, slots: torch.Tensor, raw_slots: torch.Tensor, rotary: torch.Tensor
    ) -> None:
        """Rotate kept unrotated keys (`samples`, `raw_slots`, int64 `[n]`) to `rotary` and store them in `slots`."""
        keys, rotated = self._parts[KEYS], self._rotated(samples, raw_slots, rotary)
        if isinstance(keys, torch.Tensor):
            keys[samples, :, slots] = rotated
        else:
            keys.write(samples, slots, rotated)

    @property
    def num_bytes(self) -> int:
        """The memory of the stored keys and values, in bytes; those of the text, and what layers share, are not
        counted."""
        raw = 0 if self.raw_key is None else self.raw_key.nbytes
        return raw + sum(own.nbytes if isinstance(own, torch.Tensor) else own.num_bytes for own in self._parts)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        raw_key: torch.Tensor,
        chunk: ChunkSlots,
        backend: AttentionBackendName | None,
    ) -> torch.Tensor:
        """Write the chunk's keys and values and attend to everything that is cached; see [`update`] and
        [`attend.attend`]."""
        if torch.is_grad_enabled():
            key, value = self.update(key, value, raw_key, chunk)
            return self._attend(query, key, value, chunk, backend)
        self.write(key, value, raw_key, chunk)
        return self.attend_to_visible(query, chunk, backend)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: ChunkSlots,
        backend: AttentionBackendName | None,
    ) -> torch.Tensor:
        if chunk.blocks is None or torch.is_grad_enabled():
            return attend(query, key, value, backend, self.scratch)
        return attend_to_blocks(query, key, value, chunk.blocks, backend, self.scratch)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor, chunk: ChunkSlots
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the chunk's keys (rotated; `raw_key` unrotated) and values, and return everything that is cached.

        Args:
            key, value, raw_key: `[B, num_frames * tokens, heads, head_dim]`.
            chunk: Where this chunk's frames go.

        Returns:
            Keys and values `[B, length * tokens, heads, head_dim]`, in the dtype of `key`: views of `visible`. With
            gradients enabled, copies: a backward needs them as they are now, and the next step overwrites the cache.
            (Only where the whole network is compiled: else, a forward with gradients has a `ChunkHistory`.)
        """
        self.write(key, value, raw_key, chunk)
        if torch.is_grad_enabled():
            index = (chunk.samples, slice(None), chunk.token_slots)
            cached = self._copy_visible(key.dtype)
            cached[0][index], cached[1][index] = key, value
        else:
            cached = [states.to(key.dtype) for states in self.visible]
        return cached[0].transpose(1, 2), cached[1].transpose(1, 2)

    def attend_to_visible(
        self, query: torch.Tensor, chunk: ChunkSlots, backend: AttentionBackendName | None
    ) -> torch.Tensor:
        """Attend to what is cached, which the chunk's keys and values were written to."""
        key, value = (states.to(query.dtype).transpose(1, 2) for states in self.visible)
        return self._attend(query, key, value, chunk, backend)

    def destination(self, chunk: ChunkSlots) -> Destination | None:
        """Where a fused kernel writes the chunk's keys and values, in place of [`write`]; None where it cannot."""
        keys, values = self.visible
        return Destination(keys, values, chunk.token_slots, self.raw_key, chunk.raw_slots)

    def write(self, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor, chunk: ChunkSlots) -> None:
        """Write the chunk's keys and values where `visible` has them; the arguments are those of [`update`]."""
        index = (chunk.samples, slice(None), chunk.token_slots)
        for states, new in zip(self.visible, (key, value), strict=True):
            states[index] = new.detach().to(states.dtype)
        self._write_raw(raw_key, chunk)

    def _write_raw(self, raw_key: torch.Tensor, chunk: ChunkSlots) -> None:
        """Keep the unrotated keys of a chunk, where they may be rotated again."""
        if self.raw_key is not None:
            assert chunk.raw_slots is not None  # `KVCache` makes both, or neither
            raw_frames = in_frames(raw_key, chunk.num_frames).detach().to(self.raw_key.dtype)
            self.raw_key[chunk.samples, :, chunk.raw_slots] = raw_frames

    def _copy_visible(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Copy what is cached, keys and values, in a floating-point `dtype`."""
        return [states.to(dtype, copy=True) for states in self.visible]

    def read(self, part: int, length: int) -> torch.Tensor:
        """Copy the first `length` slots of a `part` (`KEYS` or `VALUES`), as attention would see them after a forward,
        to new memory, `[B, heads, slots, tokens, head_dim]`, laid out like the cache."""
        window = allocate_slots(self._shape, self._dtype, self._device)
        read_frames(self._parts[part], window[:, :, :length])
        return window

    def take(self, part: int, samples: torch.Tensor, slots: torch.Tensor) -> Frames:
        """Copy frames of a `part` (`KEYS` or `VALUES`) as they are stored, see [`frame_store.take_frames`]."""
        return take_frames(self._parts[part], samples, slots)

    def put_back(self, part: int, samples: torch.Tensor, slots: torch.Tensor, frames: Frames) -> None:
        """Store what [`take`] returned for the same places, bit for bit."""
        put_frames(self._parts[part], samples, slots, frames)

    def _rotated(self, samples: torch.Tensor, raw_slots: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Return kept unrotated keys, `[n, heads, tokens, head_dim]`, rotated by `rotary`."""
        assert self.raw_key is not None  # `KVCache` keeps them for relative RoPE, and only then rotates again
        raw = self.raw_key[samples, :, raw_slots].transpose(1, 2)  # [n, tokens, heads, head_dim]
        return apply_rotary(raw, rotary).transpose(1, 2)


class LayerKVCache(LayerCacheBase):
    """Keys and values in a floating-point dtype."""

    def __init__(self, shape: Shape, num_raw_slots: int, dtype: torch.dtype, device: torch.device):
        super().__init__(shape, num_raw_slots, dtype, device)
        self.key, self.value = (allocate_slots(shape, dtype, device) for _ in range(2))
        self._parts = (self.key, self.value)

    def begin_chunk(self, length: int) -> None:
        """Make the first `length` slots visible."""
        self.visible = (first_tokens(self.key, length), first_tokens(self.value, length))

    def load(self) -> None:
        """Prepare for a forward of the chunk: nothing to do, because what is visible is the cache itself."""

    def store(self, chunk: ChunkSlots) -> None:
        """Keep what a forward of the chunk wrote: nothing to do, for the same reason."""

    def get(self, length: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` slots, `[B, length * tokens, heads, head_dim]`: views of the cache
        (unless `dtype` differs from the cache's)."""
        key, value = (joined_tokens(states[:, :, :length]) for states in (self.key, self.value))
        return key.to(dtype or key.dtype), value.to(dtype or value.dtype)


class DequantBuffers:
    """The buffers that packed layers unpack into what a forward attends to: one pair for all layers, since these run
    one after the other."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        self.key, self.value = (allocate_slots(shape, dtype, device) for _ in range(2))
        self._length, self._visible = shape[2], (first_tokens(self.key, shape[2]), first_tokens(self.value, shape[2]))

    def first(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `length` slots of both, `[B, heads, length * tokens, head_dim]`: the same two tensors until
        `length` changes, so that a compiler sees that the layers share them."""
        if self._length != length:
            self._length, self._visible = length, (first_tokens(self.key, length), first_tokens(self.value, length))
        return self._visible

    @property
    def num_bytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


class PackedLayerKVCache(LayerCacheBase):
    """A [`LayerKVCache`] in NVFP4 or FP8.

    A chunk is quantized once, in the forward that is remembered (`chunk.finished`); in the forwards before, it is
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
        self._parts = (self.key, self.value)
        self._dequant_buffers = dequant_buffers
        self._received: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values as another rank packed them

    @property
    def can_receive(self) -> bool:
        """Whether other ranks may send the keys and values of a finished chunk as they are stored here: they can where
        nothing else of them is kept."""
        return isinstance(self.key, NVFP4Frames) and self.raw_key is None

    def pack(self, key: torch.Tensor, value: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Quantize whole frames, `[B, num_frames * tokens, heads, head_dim]`, to bytes `[B, num_frames, heads, n]`."""
        frames = (in_frames(states, num_frames) for states in (key, value))
        return torch.cat([store.pack(own) for store, own in zip((self.key, self.value), frames, strict=True)], dim=-1)

    def attend_to_packed(
        self, query: torch.Tensor, packed: torch.Tensor, chunk: ChunkSlots, backend: AttentionBackendName | None
    ) -> torch.Tensor:
        """Attend like [`attend`] in the forward of a finished chunk, whose keys and values were packed by [`pack`];
        [`store`] then keeps just these bytes."""
        keys, values = packed.split([sum(self.key.bytes_of_frame), sum(self.value.bytes_of_frame)], dim=-1)
        self._received = (keys, values)
        for stored, states, received in zip((self.key, self.value), self.visible, self._received, strict=True):
            batch, frames, heads, _ = received.shape
            unpacked = states.new_empty(batch, heads, frames, *self._shape[3:])
            stored.read_packed(received, unpacked)
            self._by_slot(states)[chunk.samples, :, chunk.slots] = unpacked.transpose(1, 2)
        return self.attend_to_visible(query, chunk, backend)

    def begin_chunk(self, length: int) -> None:
        """Make the first `length` slots visible."""
        self.visible = self._dequant_buffers.first(length)

    def load(self) -> None:
        """Unpack this layer into the buffers of all layers, before a forward of the chunk."""
        self.key.read_into(self._by_slot(self.visible[0]))
        self.value.read_into(self._by_slot(self.visible[1]))

    def store(self, chunk: ChunkSlots) -> None:
        """Quantize what the forward of a finished chunk wrote into the buffers."""
        if self._received is not None:
            for stored, received in zip((self.key, self.value), self._received, strict=True):
                stored.write_packed(chunk.samples, chunk.slots, received)
            self._received = None
        elif chunk.finished:
            for stored, states in zip((self.key, self.value), self.visible, strict=True):
                stored.write_from(self._by_slot(states), chunk.slots)

    def _by_slot(self, states: torch.Tensor) -> torch.Tensor:
        """View `[B, heads, length * tokens, head_dim]` as `[B, heads, length, tokens, head_dim]`."""
        return states.unflatten(2, (-1, self._shape[3]))


def in_frames(states: torch.Tensor, num_frames: int) -> torch.Tensor:
    """`[B, frames * tokens, heads, dim]` -> `[B, frames, heads, tokens, dim]`."""
    return states.unflatten(1, (num_frames, -1)).transpose(2, 3)


def allocate_slots(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """
    Allocate `[B, heads, slots, tokens, dim]`, zeros; what one head reads is contiguous.

    Between the heads lies a token that belongs to no slot. So the filled slots are never all of the memory, and a
    compiler, to which all of it is another layout than a part, needs no graph of its own for a cache that is full.
    """
    batch, heads, slots, tokens, dim = shape
    memory = torch.zeros(batch, heads, slots * tokens + 1, dim, dtype=dtype, device=device)
    return memory[:, :, :-1].unflatten(2, (slots, tokens))


def first_tokens(states: torch.Tensor, length: int) -> torch.Tensor:
    """View the first `length` slots of `[B, heads, slots, tokens, dim]` as `[B, heads, length * tokens, dim]`."""
    return states.flatten(2, 3)[:, :, : length * states.shape[3]]


def joined_tokens(states: torch.Tensor) -> torch.Tensor:
    """`[B, heads, slots, tokens, dim]` -> `[B, slots * tokens, heads, dim]`."""
    return states.flatten(2, 3).transpose(1, 2)
