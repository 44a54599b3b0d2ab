"""Frames in E4M3 with one scale for each head of a video, which attention can read as they lie."""

from typing import Self

import torch

from ..fp8.e4m3 import from_codes, scales_of, to_codes
from .frame_store import PackedFrames


class ScaledFrames(PackedFrames):
    """
    Frames in float8_e4m3fn, all of a head's with one scale.

    Args:
        codes: The memory they are stored in, uint8 `[B, heads, slots, tokens, head_dim]`.
    """

    def __init__(self, codes: torch.Tensor):
        self.codes = codes
        self.scale = torch.zeros(codes.shape[:2], dtype=torch.float32, device=codes.device)
        """`[B, heads]`; 0 until the first numbers are seen."""

    @property
    def parts(self) -> list[torch.Tensor]:
        """The codes; the scales are no frame's own."""
        return [self.codes]

    def with_parts(self, parts: list[torch.Tensor]) -> Self:
        """Return a store of the same kind for other frames of the same videos."""
        frames = type(self)(parts[0])
        frames.scale = self.scale
        return frames

    def calibrate(self, states: torch.Tensor) -> None:
        """Choose the scales that are not chosen yet, by the first numbers `[B, tokens, heads, head_dim]`."""
        self.scale.copy_(torch.where(self.scale > 0, self.scale, scales_of(states, (1, 3))))

    def take(self, samples: torch.Tensor, slots: torch.Tensor) -> Self:
        """Copy frames, bit for bit, see [`PackedFrames.take`], with the scales of their videos."""
        frames = super().take(samples, slots)
        frames.scale = self.scale[samples]
        return frames

    def write(self, samples: torch.Tensor, slots: torch.Tensor, frames: torch.Tensor) -> None:
        """Quantize frames `[..., heads, tokens, head_dim]` into `slots` of `samples`, see [`PackedFrames.write`]."""
        factor = self.scale[samples].reciprocal()[..., None, None]
        self._put(samples, slots, [to_codes(frames, factor)])

    def read_into(self, target: torch.Tensor) -> None:
        """Dequantize the first slots into `target`, `[B, heads, length, tokens, head_dim]`, for as many as it has."""
        scale = self.scale[..., None, None, None].to(target.dtype)
        target.copy_(from_codes(self.codes[:, :, : target.shape[2]], target.dtype).mul_(scale))
