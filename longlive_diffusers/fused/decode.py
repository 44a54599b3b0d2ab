"""Codes in E4M3 to numbers, with a scale for each head. On a GPU, this is one kernel, in place of a conversion and a
product."""

import torch

from ..fp8.e4m3 import from_codes
from . import operators
from .layers import uses_fused_kernels


def decode_heads(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Return the numbers that codes stand for, times the scale of their head.

    Args:
        codes: uint8 `[B, tokens, heads, head_dim]`.
        scale: Powers of two, float32 `[B, heads]`.
        dtype: That of the result.
    """
    if uses_fused_kernels(codes):
        return operators.decode_heads(codes, scale, dtype)
    return from_codes(codes, dtype).mul_(scale[:, None, :, None].to(dtype))
