"""Storage of the keys or values of latent frames in few bits: NVFP4, or FP8 for those who want more of them.

What is cached is read by every later chunk and written once, so it pays to write it small. The stores have one
interface (`write`, `write_from`, `take`, `read_into`, `num_bytes`, `unsupported_reason`) and stand in one registry,
`FRAME_STORES`, from which `kv_cache_dtype`, the command line's choices and the checks take their names. Each frame of
each head has its own scales, so that frames can be replaced one by one, or taken out as they are (`take`).

Keys in NVFP4 are *centered* first: the mean over the tokens of a frame is subtracted, for each head and channel, kept
in float32, and added back when the keys are read. Channels of keys have large offsets that all tokens share; with
them, the 4 bits are spent on the offset and little is left for the differences between tokens, which are all that
attention looks at. Attention cannot see what all keys share: a vector m added to every key adds q.m to every score of
a query q, and softmax cancels what is added to all. (Frames have different means, so these are kept, not dropped. The
mean over *channels*, which LongLive-2.0's code subtracts, is another thing: it differs from token to token, so
attention sees it.)
"""

from copy import copy
from typing import Self

import torch

from ..nvfp4.format import BLOCK, in_block_scales, quantize_unchecked
from ..nvfp4.operators import read_fp8_frames, read_nvfp4_frames, write_fp8_frames, write_nvfp4_frames
from ..nvfp4.rules import MAX_SCALE, scale_rule_named
from ..triton_launch import uses_kernels


Shape = tuple[int, int, int, int, int]  # batch, heads, slots, tokens of a frame, head_dim
KEYS, VALUES = 0, 1  # the two parts of a cache
FOR_KERNELS = (torch.float32, torch.bfloat16)


class PackedFrames:
    """What the stores in few bits have in common: frames are a few tensors, `parts`, `[B, heads, slots, ...]` each."""

    @property
    def parts(self) -> list[torch.Tensor]:
        """Everything that is stored."""
        raise NotImplementedError

    def with_parts(self, parts: list[torch.Tensor]) -> Self:
        """Return a store of the same kind for other frames."""
        raise NotImplementedError

    def read_into(self, target: torch.Tensor) -> None:
        """Dequantize the first slots into `target`, `[B, heads, length, tokens, head_dim]`, for as many as it has."""
        raise NotImplementedError

    def _quantized(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """Quantize frames `[..., heads, tokens, head_dim]` to their parts."""
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """The memory of everything that is stored, in bytes."""
        return sum(part.nbytes for part in self.parts)

    def write(self, samples: torch.Tensor, slots: torch.Tensor, frames: torch.Tensor) -> None:
        """Quantize frames `[..., heads, tokens, head_dim]` into `slots` of `samples` (int64, broadcasting to
        `[...]`)."""
        self._put(samples, slots, self._quantized(frames))

    def write_from(self, window: torch.Tensor, slots: torch.Tensor) -> None:
        """Quantize those frames of a window, `[B, heads, length, tokens, head_dim]`, that stand in `slots` (int64
        `[B, n]`) into the same slots."""
        samples = torch.arange(len(slots), device=slots.device)[:, None]
        self.write(samples, slots, window[samples, :, slots])

    def take(self, samples: torch.Tensor, slots: torch.Tensor) -> Self:
        """Copy frames, bit for bit, into a store of n samples with one slot each (`samples`, `slots`, int64 `[n]`)."""
        return self.with_parts([_take(part, samples, slots) for part in self.parts])

    def put(self, samples: torch.Tensor, slots: torch.Tensor, frames: "PackedFrames") -> None:
        """Store what [`take`] returned, bit for bit, in `slots` of `samples` (int64 `[n]`)."""
        self._put(samples, slots, [part.squeeze(2) for part in frames.parts])

    def pack(self, frames: torch.Tensor) -> torch.Tensor:
        """Quantize frames `[..., heads, tokens, head_dim]` to the bytes that are stored for each, `[..., heads, n]`,
        so that they can be sent to another process."""
        return torch.cat([part.flatten(-2).view(torch.uint8) for part in self._quantized(frames)], dim=-1)

    def write_packed(self, samples: torch.Tensor, slots: torch.Tensor, packed: torch.Tensor) -> None:
        """Store what [`pack`] returned, bit for bit, like [`write`]."""
        self._put(samples, slots, self._unpacked(packed))

    def read_packed(self, packed: torch.Tensor, target: torch.Tensor) -> None:
        """Dequantize what [`pack`] returned for frames `[B, n, heads, ...]` into `target`, `[B, heads, n, tokens,
        head_dim]`."""
        self.with_parts([part.transpose(1, 2).contiguous() for part in self._unpacked(packed)]).read_into(target)

    @property
    def bytes_of_frame(self) -> list[int]:
        """The bytes of each part of a frame of a head."""
        return [part[0, 0, 0].nbytes for part in self.parts]

    def _unpacked(self, packed: torch.Tensor) -> list[torch.Tensor]:
        return [
            part.contiguous().view(like.dtype).unflatten(-1, like.shape[-2:])
            for part, like in zip(packed.split(self.bytes_of_frame, dim=-1), self.parts, strict=True)
        ]

    def _put(self, samples: torch.Tensor, slots: torch.Tensor, parts: list[torch.Tensor]) -> None:
        for stored, new in zip(self.parts, parts, strict=True):
            stored[samples, :, slots] = new


class NVFP4Frames(PackedFrames):
    """
    Frames in NVFP4, with linear scales.

    Args:
        shape: The shape of the store, `[B, heads, slots, tokens, head_dim]`; head_dim is a multiple of 16.
        device: The device that the frames are stored on.
        for_keys: Whether these are keys, whose mean over tokens is stored separately.
        scale_rule: How the scales are chosen, see `nvfp4/rules.py`.

    Raises:
        ValueError: If head_dim is not a multiple of 16.
    """

    def __init__(self, shape: Shape, device: torch.device, *, for_keys: bool, scale_rule: str = "mse"):
        *frames, tokens, head_dim = shape
        if reason := self.unsupported_reason(head_dim):
            raise ValueError(f"A KV cache in NVFP4 {reason}.")
        self.scale_rule = scale_rule
        self.codes = torch.zeros(*frames, tokens, head_dim // 2, dtype=torch.uint8, device=device)
        # float8_e4m3fn, as bytes: that dtype cannot be written by index everywhere.
        self.scales = torch.zeros(*frames, tokens, head_dim // BLOCK, dtype=torch.uint8, device=device)
        self.amax = torch.zeros(*frames, 1, 1, dtype=torch.float32, device=device)
        mean = (*frames, 1, head_dim)
        self.mean = torch.zeros(mean, dtype=torch.float32, device=device) if for_keys else None

    @staticmethod
    def unsupported_reason(head_dim: int) -> str | None:
        """Why heads of this size cannot be stored, as the end of a sentence; None if they can."""
        if head_dim % BLOCK:
            return f"needs a head_dim in multiples of {BLOCK}, this network's is {head_dim}"
        return None

    @property
    def parts(self) -> list[torch.Tensor]:
        """Codes, block scales, each frame's largest number and, of keys, the mean."""
        return [part for part in (self.codes, self.scales, self.amax, self.mean) if part is not None]

    def with_parts(self, parts: list[torch.Tensor]) -> Self:
        """Return a store of the same kind for other frames."""
        frames = copy(self)
        frames.codes, frames.scales, frames.amax, *mean = parts
        frames.mean = mean[0] if mean else None
        return frames

    def _quantized(self, frames: torch.Tensor) -> list[torch.Tensor]:
        states, means = frames.float(), []
        if self.mean is not None:
            means = [states.mean(dim=-2, keepdim=True)]
            states = states - means[0]
        amax = states.abs().amax(dim=(-2, -1), keepdim=True)
        packed = quantize_unchecked(states, self.scale_rule, amax=amax)
        return [packed.codes, packed.scales.view(torch.uint8), amax, *means]

    def write_from(self, window: torch.Tensor, slots: torch.Tensor) -> None:
        """Quantize frames of a window, see [`PackedFrames.write_from`]. The kernel takes the sum of a mean in an order
        of its own, so that the mean's last bits may differ; given the mean, all others are the same."""
        if self._has_kernels_for(window):
            write_nvfp4_frames(window, slots, self.codes, self.scales, self.amax, self.mean, self.scale_rule)
        else:
            super().write_from(window, slots)

    def _has_kernels_for(self, window: torch.Tensor) -> bool:
        head_dim = window.shape[-1]
        return head_dim & (head_dim - 1) == 0 and window.dtype in FOR_KERNELS and uses_kernels(window)

    def read_into(self, target: torch.Tensor) -> None:
        """Dequantize the first slots into `target`, `[B, heads, length, tokens, head_dim]`, for as many as it has."""
        length = target.shape[2]
        if not length:
            return
        if self._has_kernels_for(target):
            read_nvfp4_frames(self.codes, self.scales, self.amax, self.mean, self.scale_rule, target)
            return
        codes, scales, amax = (part[:, :, :length] for part in (self.codes, self.scales, self.amax))
        # The block scales are few, so they absorb the global one; the large tensor is touched only once.
        scales = scales.view(torch.float8_e4m3fn).float() * (amax / scale_rule_named(self.scale_rule).span)
        values = in_block_scales(codes, scales)
        if self.mean is not None:
            values += self.mean[:, :, :length]
        target.copy_(values)


class FP8Frames(PackedFrames):
    """
    Frames in float8_e4m3fn, with one scale for each frame of each head.

    Args:
        shape: The shape of the store, `[B, heads, slots, tokens, head_dim]`.
        device: The device that the frames are stored on.
        for_keys: Ignored: keys are stored like values, because 8 bits have room for their offsets.
    """

    def __init__(self, shape: Shape, device: torch.device, *, for_keys: bool):
        self.codes = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(*shape[:3], 1, 1, dtype=torch.float32, device=device)

    @staticmethod
    def unsupported_reason(head_dim: int) -> str | None:
        """None: heads of any size can be stored."""
        return None

    @property
    def parts(self) -> list[torch.Tensor]:
        """Codes and each frame's scale."""
        return [self.codes, self.scale]

    def with_parts(self, parts: list[torch.Tensor]) -> Self:
        """Return a store of the same kind for other frames."""
        frames = copy(self)
        frames.codes, frames.scale = parts
        return frames

    def _quantized(self, frames: torch.Tensor) -> list[torch.Tensor]:
        states = frames.float()
        scale = states.abs().amax(dim=(-2, -1), keepdim=True) / MAX_SCALE
        codes = (states / scale.clamp(min=1e-30)).clamp(-MAX_SCALE, MAX_SCALE).to(torch.float8_e4m3fn)
        return [codes.view(torch.uint8), scale]

    def write_from(self, window: torch.Tensor, slots: torch.Tensor) -> None:
        """Quantize frames of a window, see [`PackedFrames.write_from`]."""
        if window.dtype in FOR_KERNELS and uses_kernels(window):
            write_fp8_frames(window, slots, self.codes, self.scale)
        else:
            super().write_from(window, slots)

    def read_into(self, target: torch.Tensor) -> None:
        """Dequantize slots, like [`NVFP4Frames.read_into`]."""
        length = target.shape[2]
        if not length:
            return
        if target.dtype in FOR_KERNELS and uses_kernels(target):
            read_fp8_frames(self.codes, self.scale, target)
            return
        codes = self.codes[:, :, :length].view(torch.float8_e4m3fn)
        target.copy_(codes.float().mul_(self.scale[:, :, :length]))


FrameStore = NVFP4Frames | FP8Frames

FRAME_STORES: dict[str, type[NVFP4Frames] | type[FP8Frames]] = {"nvfp4": NVFP4Frames, "fp8": FP8Frames}
"""The stores in few bits, by their names in `kv_cache_dtype` and on the command line."""

Frames = torch.Tensor | PackedFrames
"""Frames as they are stored: `[B, heads, slots, tokens, head_dim]`, or in few bits."""


def take_frames(stored: Frames, samples: torch.Tensor, slots: torch.Tensor) -> Frames:
    """Copy frames as they are stored, see [`NVFP4Frames.take`]."""
    if isinstance(stored, torch.Tensor):
        return _take(stored, samples, slots)
    return stored.take(samples, slots)


def put_frames(stored: Frames, samples: torch.Tensor, slots: torch.Tensor, frames: Frames) -> None:
    """Store what [`take_frames`] returned of a store of the same kind, bit for bit."""
    if isinstance(stored, torch.Tensor):
        assert isinstance(frames, torch.Tensor)
        stored[samples, :, slots] = frames.squeeze(2)
    else:
        assert isinstance(frames, PackedFrames)
        stored.put(samples, slots, frames)


def read_frames(stored: Frames, target: torch.Tensor) -> None:
    """Read the first slots into `target`, see [`NVFP4Frames.read_into`]."""
    if isinstance(stored, torch.Tensor):
        target.copy_(stored[:, :, : target.shape[2]])
    else:
        stored.read_into(target)


def _take(part: torch.Tensor, samples: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return part[samples, :, slots].unsqueeze(2)
