"""Storage of the keys or values of latent frames in few bits: NVFP4, or FP8 for those who want more of them.

What is cached is read by every later chunk and written once, so it pays to write it small. The stores have one
interface (`write`, `take`, `read_into`, `num_bytes`, `unsupported_reason`) and stand in one registry, `FRAME_STORES`,
from which `kv_cache_dtype`, the command line's choices and the checks take their names. Each frame of each head has
its own scales, so that frames can be replaced one by one, or taken out as they are (`take`).

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
from ..nvfp4.load_kernels import uses_kernels
from ..nvfp4.operators import read_fp8_frames, read_nvfp4_frames
from ..nvfp4.rules import MAX_SCALE, scale_rule_named


Shape = tuple[int, int, int, int, int]  # batch, heads, slots, tokens of a frame, head_dim
KEYS, VALUES = 0, 1  # the two parts of a cache
READ_BY_KERNELS = (torch.float32, torch.bfloat16)


class NVFP4Frames:
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
        self.amax = torch.zeros(*frames, 1, 1, device=device)
        self.mean = torch.zeros(*frames, 1, head_dim, device=device) if for_keys else None

    @staticmethod
    def unsupported_reason(head_dim: int) -> str | None:
        """Why heads of this size cannot be stored, as the end of a sentence; None if they can."""
        if head_dim % BLOCK:
            return f"needs a head_dim in multiples of {BLOCK}, this network's is {head_dim}"
        return None

    @property
    def num_bytes(self) -> int:
        """The memory of everything that is stored, in bytes."""
        buffers = (self.codes, self.scales, self.amax, self.mean)
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    def write(self, samples: torch.Tensor, slots: torch.Tensor, frames: torch.Tensor) -> None:
        """Quantize frames `[..., heads, tokens, head_dim]` into `slots` of `samples` (int64, broadcasting to
        `[...]`)."""
        states = frames.float()
        if self.mean is not None:
            mean = states.mean(dim=-2, keepdim=True)
            states = states - mean
            self.mean[samples, :, slots] = mean
        amax = states.abs().amax(dim=(-2, -1), keepdim=True)
        packed = quantize_unchecked(states, self.scale_rule, amax=amax)
        self.codes[samples, :, slots] = packed.codes
        self.scales[samples, :, slots] = packed.scales.view(torch.uint8)
        self.amax[samples, :, slots] = amax

    def take(self, samples: torch.Tensor, slots: torch.Tensor) -> Self:
        """Copy frames, bit for bit, into a store of n samples with one slot each (`samples`, `slots`, int64 `[n]`)."""
        taken = copy(self)
        taken.codes, taken.scales, taken.amax = (
            _take(part, samples, slots) for part in (self.codes, self.scales, self.amax)
        )
        taken.mean = None if self.mean is None else _take(self.mean, samples, slots)
        return taken

    def read_into(self, target: torch.Tensor) -> None:
        """Dequantize the first slots into `target`, `[B, heads, length, tokens, head_dim]`, for as many as it has."""
        length, head_dim = target.shape[2], target.shape[-1]
        if not length:
            return
        if head_dim & (head_dim - 1) == 0 and target.dtype in READ_BY_KERNELS and uses_kernels(target):
            read_nvfp4_frames(self.codes, self.scales, self.amax, self.mean, self.scale_rule, target)
            return
        codes, scales, amax = (part[:, :, :length] for part in (self.codes, self.scales, self.amax))
        # The block scales are few, so they absorb the global one; the large tensor is touched only once.
        scales = scales.view(torch.float8_e4m3fn).float() * (amax / scale_rule_named(self.scale_rule).span)
        values = in_block_scales(codes, scales)
        if self.mean is not None:
            values += self.mean[:, :, :length]
        target.copy_(values)


class FP8Frames:
    """
    Frames in float8_e4m3fn, with one scale for each frame of each head.

    Args:
        shape: The shape of the store, `[B, heads, slots, tokens, head_dim]`.
        device: The device that the frames are stored on.
        for_keys: Ignored: keys are stored like values, because 8 bits have room for their offsets.
    """

    def __init__(self, shape: Shape, device: torch.device, *, for_keys: bool):
        self.codes = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(*shape[:3], 1, 1, device=device)

    @staticmethod
    def unsupported_reason(head_dim: int) -> str | None:
        """None: heads of any size can be stored."""
        return None

    @property
    def num_bytes(self) -> int:
        """The memory of everything that is stored, in bytes."""
        return self.codes.nbytes + self.scale.nbytes

    def write(self, samples: torch.Tensor, slots: torch.Tensor, frames: torch.Tensor) -> None:
        """Quantize frames into slots, like [`NVFP4Frames.write`]."""
        states = frames.float()
        scale = states.abs().amax(dim=(-2, -1), keepdim=True) / MAX_SCALE
        codes = (states / scale.clamp(min=1e-30)).clamp(-MAX_SCALE, MAX_SCALE).to(torch.float8_e4m3fn)
        self.codes[samples, :, slots] = codes.view(torch.uint8)
        self.scale[samples, :, slots] = scale

    def take(self, samples: torch.Tensor, slots: torch.Tensor) -> Self:
        """Copy frames into a store of their own, like [`NVFP4Frames.take`]."""
        taken = copy(self)
        taken.codes, taken.scale = (_take(part, samples, slots) for part in (self.codes, self.scale))
        return taken

    def read_into(self, target: torch.Tensor) -> None:
        """Dequantize slots, like [`NVFP4Frames.read_into`]."""
        length = target.shape[2]
        if not length:
            return
        if target.dtype in READ_BY_KERNELS and uses_kernels(target):
            read_fp8_frames(self.codes, self.scale, target)
            return
        codes = self.codes[:, :, :length].view(torch.float8_e4m3fn)
        target.copy_(codes.float().mul_(self.scale[:, :, :length]))


FrameStore = NVFP4Frames | FP8Frames

FRAME_STORES: dict[str, type[NVFP4Frames] | type[FP8Frames]] = {"nvfp4": NVFP4Frames, "fp8": FP8Frames}
"""The stores in few bits, by their names in `kv_cache_dtype` and on the command line."""

Frames = torch.Tensor | FrameStore
"""Frames as they are stored: `[B, heads, slots, tokens, head_dim]`, or in few bits."""


def take_frames(stored: Frames, samples: torch.Tensor, slots: torch.Tensor) -> Frames:
    """Copy frames as they are stored, see [`NVFP4Frames.take`]."""
    if isinstance(stored, torch.Tensor):
        return _take(stored, samples, slots)
    return stored.take(samples, slots)


def read_frames(stored: Frames, target: torch.Tensor) -> None:
    """Read the first slots into `target`, see [`NVFP4Frames.read_into`]."""
    if isinstance(stored, torch.Tensor):
        target.copy_(stored[:, :, : target.shape[2]])
    else:
        stored.read_into(target)


def _take(part: torch.Tensor, samples: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return part[samples, :, slots].unsqueeze(2)
