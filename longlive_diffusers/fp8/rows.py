"""Rows in FP8 (E4M3), each with a scale of its own: weights, and what layers that multiply in 8 bits read."""

from dataclasses import dataclass

import torch

from ..triton_launch import uses_kernels
from .e4m3 import LARGEST
from .operators import quantize_rows


@dataclass(frozen=True)
class FP8Rows:
    """
    The input of a layer, in bfloat16, after it was quantized: in place of the tensor, where all that reads it
    multiplies in FP8.

    Args:
        codes: float8_e4m3fn `[rows, features]`.
        scale: The scales of the rows, float32 `[rows, 1]`.
        shape: The shape of the input, `[..., features]`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    shape: torch.Size

    @classmethod
    def of(cls, x: torch.Tensor) -> "FP8Rows":
        """Quantize an input `[..., features]`."""
        return cls(*rows_to_fp8(x.reshape(-1, x.shape[-1])), x.shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the input, and of what layers make of it."""
        return torch.bfloat16


def rows_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to float8_e4m3fn `[rows, cols]`; also return the scales of the rows, float32 `[rows, 1]`."""
    if uses_kernels(x):
        return quantize_rows(x)
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale
