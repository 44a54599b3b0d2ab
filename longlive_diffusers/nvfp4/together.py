"""Several layers on one input, which is quantized once for all of them, or was before."""

from collections.abc import Sequence

import torch
from torch import nn

from ..fp8.rows import FP8Rows
from ..fused.layers import is_plain
from .fp8_linear import FP8Linear
from .linear import NVFP4Linear


def apply_together(layers: Sequence[nn.Module], x: torch.Tensor | FP8Rows) -> list[torch.Tensor]:
    """Apply several layers to one input, which is quantized once where all of them take it in FP8.

    Args:
        layers: The layers.
        x: Their input, `[..., in_features]`; in FP8 only where [`take_fp8`] said so of the layers.
    """
    if isinstance(x, torch.Tensor):
        if not take_fp8(layers, x):
            return [layer(x) for layer in layers]
        x = FP8Rows.of(x)
    return [layer.multiply_fp8(x) for layer in layers if isinstance(layer, NVFP4Linear | FP8Linear)]


def take_fp8(layers: Sequence[nn.Module], x: torch.Tensor) -> bool:
    """Whether there are layers, the product of each with `x` is that of both in FP8, and nothing is around a layer. Of
    `x`, only shape, dtype and device count."""
    return bool(layers) and all(_takes_fp8(layer, x) for layer in layers)


def _takes_fp8(layer: nn.Module, x: torch.Tensor) -> bool:
    if is_plain(layer, NVFP4Linear, x.device) or is_plain(layer, FP8Linear, x.device):
        return layer.takes_fp8(x)
    return False
