"""What one layer remembers of a streamed video: keys and values, in the network's precision or in fewer bits."""

from dataclasses import dataclass

import torch

from ..nvfp4.frame_store import FP8Frames, NVFP4Frames
from .rotary import apply_rotary


@dataclass(frozen=True)
class ChunkPlan:
    """Where the forwards of one chunk write and read; made once for each chunk, the same for all layers.

    `rows` and `slots` are int64 `[B, 1]` and `[B, num_frames]`: sample b's frames are written to `slots[b]`.
    `length` is the number of filled slots. `raw_rows`, `raw_frames`, `raw_slots` (int64 `[n]`, or None) name the
    frames of the chunk whose unrotated keys are kept as well. `finished`: the latents are the clean ones, and what
    the forward computes is what is to be remembered.
    """

    num_frames: int
    rows: torch.Tensor
    slots: torch.Tensor
    length: int
    rotary: torch.Tensor
    raw_rows: torch.Tensor | None = None
    raw_frames: torch.Tensor | None = None
    raw_slots: torch.Tensor | None = None
    finished: bool = False


class LayerCacheBase:
    """What both kinds of layer keep as it is: the text's keys and values and, for relative RoPE, unrotated keys."""

    def __init__(
        self, shape: tuple[int, int, int, int, int], raw_slots: int, dtype: torch.dtype, device: torch.device
    ):
        raw_shape = (*shape[:2], raw_slots, *shape[3:])
        self.raw_key = torch.zeros(raw_shape, dtype=dtype, device=device) if raw_slots else None
        self.text: tuple[torch.Tensor, torch.Tensor] | None = None

    def reset(self) -> None:
        """Forget the text; frames are forgotten by `KVCache.reset`, which owns their bookkeeping."""
        self.text = None

    def _keep_raw(self, raw_key: torch.Tensor, plan: ChunkPlan) -> None:
        if plan.raw_slots is not None:
            raw_frames = in_frames(raw_key, plan.num_frames)[plan.raw_rows, plan.raw_frames]
            self.raw_key[plan.raw_rows, :, plan.raw_slots] = raw_frames.detach().to(self.raw_key.dtype)

    def _rotated(self, rows: torch.Tensor, raw_slots: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Kept keys, `[n, heads, tokens, head_dim]`, at the positions of `rotary`."""
        raw = self.raw_key[rows, :, raw_slots].transpose(1, 2)  # [n, tokens, heads, head_dim]
        return apply_rotary(raw, rotary).transpose(1, 2)


class LayerKVCache(LayerCacheBase):
    """Keys and values of one layer, `[B, heads, slots, tokens per frame, head_dim]`, preallocated.

    Heads come before slots so that what one head reads is contiguous. The interface is all that the attention
    processor and `KVCache` know; `PackedLayerKVCache` stores in fewer bits behind the same one.
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], raw_slots: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(shape, raw_slots, dtype, device)
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor, plan: ChunkPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the chunk's keys (rotated; `raw_key` unrotated) and values, and return everything that is cached.

        Args:
            key, value, raw_key: `[B, num_frames * tokens, heads, head_dim]`.
            plan: Where this chunk's frames go.

        Returns:
            Keys and values `[B, length * tokens, heads, head_dim]`, in the dtype of `key`: views of the cache. With
            gradients enabled, copies: a backward needs them as they are now, and the next step overwrites the cache.
        """
        heads_first = [in_frames(states, plan.num_frames) for states in (key, value)]
        self.key[plan.rows, :, plan.slots] = heads_first[0].detach().to(self.key.dtype)
        self.value[plan.rows, :, plan.slots] = heads_first[1].detach().to(self.value.dtype)
        self._keep_raw(raw_key, plan)
        if torch.is_grad_enabled():
            index = (plan.rows, slice(None), plan.slots)
            cached = [states[:, :, : plan.length].to(key.dtype, copy=True) for states in (self.key, self.value)]
            cached[0][index], cached[1][index] = heads_first
            return tuple(states.flatten(2, 3).transpose(1, 2) for states in cached)
        return self.get(plan.length, key.dtype)

    def get(self, length: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` slots, `[B, length * tokens, heads, head_dim]`: views of the cache
        (unless `dtype` differs from the cache's)."""
        return tuple(
            states[:, :, :length].flatten(2, 3).transpose(1, 2).to(dtype or states.dtype)
            for states in (self.key, self.value)
        )

    def rotate_again(
        self, rows: torch.Tensor, slots: torch.Tensor, raw_slots: torch.Tensor, rotary: torch.Tensor
    ) -> None:
        """Rotate kept unrotated keys (`rows`, `raw_slots`, int64 `[n]`) to `rotary` and store them in `slots`."""
        self.key[rows, :, slots] = self._rotated(rows, raw_slots, rotary)

    @property
    def num_bytes(self) -> int:
        """Memory of the stored keys and values; the text's are not counted."""
        return sum(buffer.nbytes for buffer in (self.key, self.value, self.raw_key) if buffer is not None)


class Scratch:
    """Where packed layers unpack what a forward attends to: one pair of buffers for all layers, as they run one after
    the other."""

    def __init__(self, shape: tuple[int, int, int, int, int], device: torch.device):
        self.shape, self.device = shape, device
        self._buffers: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}

    def buffers(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """For keys and for values, made when they are first needed."""
        if dtype not in self._buffers:
            self._buffers = {dtype: tuple(torch.zeros(self.shape, dtype=dtype, device=self.device) for _ in range(2))}
        return self._buffers[dtype]

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for pair in self._buffers.values() for buffer in pair)


class PackedLayerKVCache(LayerCacheBase):
    """A [`LayerKVCache`] in NVFP4 or FP8.

    A chunk is quantised once, in the forward on its clean latents (`plan.finished`); in the forwards before, it is
    attended to as it is and not stored. The unrotated keys that relative RoPE keeps of sinks and pins stay as they
    are, so that a key that is rotated again is still quantised once.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        raw_slots: int,
        kind: str,
        raw_dtype: torch.dtype,
        device: torch.device,
        scratch: Scratch,
    ):
        super().__init__(shape, raw_slots, raw_dtype, device)
        self.key: NVFP4Frames | FP8Frames
        self.value: NVFP4Frames | FP8Frames
        if kind == "nvfp4":
            self.key, self.value = (NVFP4Frames(shape, device, centred=is_key) for is_key in (True, False))
        else:
            self.key, self.value = FP8Frames(shape, device), FP8Frames(shape, device)
        self._scratch = scratch

    def update(
        self, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor, plan: ChunkPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`LayerKVCache.update`]; what is returned without gradients are views of the scratch buffers, good until
        the next layer's update."""
        heads_first = [in_frames(states, plan.num_frames) for states in (key, value)]
        buffers = self._unpack(plan.length, key.dtype)
        if torch.is_grad_enabled():
            buffers = tuple(states.clone() for states in buffers)
        for states, new in zip(buffers, heads_first, strict=True):
            states[plan.rows, :, plan.slots] = new
        if plan.finished:
            self.key.write(plan.rows, plan.slots, heads_first[0].detach())
            self.value.write(plan.rows, plan.slots, heads_first[1].detach())
            self._keep_raw(raw_key, plan)
        return tuple(states.flatten(2, 3).transpose(1, 2) for states in buffers)

    def get(self, length: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` slots as they were stored, `[B, length * tokens, heads, head_dim]`."""
        buffers = self._unpack(length, dtype or torch.float32)
        return tuple(states.flatten(2, 3).transpose(1, 2).clone() for states in buffers)

    def rotate_again(
        self, rows: torch.Tensor, slots: torch.Tensor, raw_slots: torch.Tensor, rotary: torch.Tensor
    ) -> None:
        """As [`LayerKVCache.rotate_again`]."""
        self.key.write(rows, slots, self._rotated(rows, raw_slots, rotary))

    @property
    def num_bytes(self) -> int:
        """As of [`LayerKVCache`], without the scratch buffers, which all layers share."""
        raw = 0 if self.raw_key is None else self.raw_key.nbytes
        return self.key.num_bytes + self.value.num_bytes + raw

    def _unpack(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (buffer[:, :, :length] for buffer in self._scratch.buffers(dtype))
        self.key.read_into(key, length)
        self.value.read_into(value, length)
        return key, value


def in_frames(states: torch.Tensor, num_frames: int) -> torch.Tensor:
    """`[B, frames * tokens, heads, dim]` -> `[B, frames, heads, tokens, dim]`."""
    return states.unflatten(1, (num_frames, -1)).transpose(2, 3)
