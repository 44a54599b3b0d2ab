"""Several layers on one input, which is quantized once for all of them."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import nn

from ..fused.layers import is_plain
from .backends import rows_to_fp8
from .fp8_linear import FP8Linear
from .linear import NVFP4Linear


def apply_together(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Apply several layers to one input, which is quantized once where all of them take it in FP8."""
    in_fp8: list[NVFP4Linear | FP8Linear] = [layer for layer in layers if takes_fp8(layer, x)]
    if len(in_fp8) == len(layers):
        codes, scale = rows_to_fp8(x.flatten(0, -2))
        return [layer.multiply_fp8(codes, scale, x.shape[:-1]) for layer in in_fp8]
    return [layer(x) for layer in layers]


def takes_fp8(layer: nn.Module, x: torch.Tensor) -> TypeGuard[NVFP4Linear | FP8Linear]:
    """Whether the layer's product with `x` is that of both in FP8, and nothing is around the layer."""
    if is_plain(layer, NVFP4Linear, x.device) or is_plain(layer, FP8Linear, x.device):
        return layer.takes_fp8(x)
    return False
