"""`FP8Linear`: a linear layer that multiplies in 8 bits, with a scale for each row of its input and its weight."""

from typing import TypeGuard

import torch
from torch import nn

from ..fp8.rows import FP8Rows, rows_to_fp8
from ..fused.layers import is_plain
from .kept_dtypes import keeping_dtypes
from .matmul import capability_unsupported_reason, fp8_matmul


class FP8Linear(nn.Linear):
    """
    `y = x W^T + b` with W and x in FP8 (E4M3), for inference: on Hopper, Ada and Blackwell twice as fast as bfloat16,
    and half the memory. Elsewhere it computes the same numbers, slowly.

    The buffers `weight_codes` and `weight_scale` stand for the weight, and keep their dtypes under any `.to(dtype)`.
    There are no gradients.
    """

    weight_codes: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        """Quantize a layer, whose bias is shared.

        Raises:
            ValueError: If the hardware cannot multiply matrices of its sizes.
        """
        nn.Module.__init__(self)  # nn.Linear's own `__init__` would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.in_features % 16 or self.out_features % 16:
            raise ValueError(f"FP8 needs multiples of 16, this layer is {self.in_features} -> {self.out_features}.")
        codes, scale = rows_to_fp8(linear.weight.detach())
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale)
        self.bias = linear.bias
        self.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:
        """The codes, for those that ask a layer where its weight is."""
        return self.weight_codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of `x`, rounded to bfloat16."""
        return self.multiply_fp8(FP8Rows.of(x)).to(x.dtype)

    def takes_fp8(self, x: torch.Tensor) -> bool:
        """Whether [`multiply_fp8`] gives what a call with `x` does."""
        return x.dtype == torch.bfloat16

    def multiply_fp8(self, x: FP8Rows) -> torch.Tensor:
        """Multiply an input that is quantized already, and add the bias: bfloat16 `[..., out_features]`."""
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        product = fp8_matmul(x.codes, x.scale, self.weight_codes, self.weight_scale, bias)
        return product.reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse: bool = True):
        with keeping_dtypes(self, ("weight_codes", "weight_scale")):
            super()._apply(fn, recurse)
        return self


def fp8_unsupported_reason(device: torch.device) -> str | None:
    """Return why a device cannot multiply in FP8, as the end of a sentence; None if it can."""
    if device.type != "cuda":
        return f"needs a GPU, this is '{device.type}'"
    return capability_unsupported_reason(device, (8, 9), " (Ada, Hopper, Blackwell)")


def can_be_fp8(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is a linear one of fitting sizes, whose weight is here and not offloaded."""
    if not isinstance(layer, nn.Linear) or layer.in_features % 16 or layer.out_features % 16:
        return False
    return not layer.weight.is_meta and is_plain(layer, nn.Linear, layer.weight.device)
