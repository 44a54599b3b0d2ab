"""The feed-forward layers of a block. GELU is applied where the largest activation of the network is written or read
in any case: before a product writes it, or where it is quantized for the next one."""

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import nn

from ..fp8.rows import FP8Rows
from . import onednn
from .layers import is_for_inference, is_plain, uses_fused_kernels
from .operators import gelu_rows_in_fp8
from .packed_linear import PackedLinear


class FusedGELU(GELU):
    """diffusers' linear layer with GELU, in its tanh approximation, computed in one operator wherever PyTorch has one.

    The result differs from that of the two by rounding: by 1e-6 of it in float32. With gradients, while compiling,
    and where `proj` is more than a linear layer (a LoRA, few bits, offloading), the two are called.
    """

    @classmethod
    def sharing(cls, layer: GELU) -> "FusedGELU":
        """Return one with the linear layer of `layer`, which is shared and not copied."""
        with torch.device("meta"):
            fused = cls(1, 1, approximate=layer.approximate)
        fused.proj = layer.proj
        return fused.train(layer.training)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        proj, device = self.proj, hidden_states.device
        if is_plain(proj, PackedLinear, device) and self.approximate == "tanh":
            return proj.multiply(hidden_states, "gelu")
        is_usual = self.approximate == "tanh" and is_plain(proj, nn.Linear, device) and proj.bias is not None
        is_converted = torch.is_autocast_enabled(device.type) or proj.weight.dtype != hidden_states.dtype
        if not is_usual or not is_for_inference() or is_converted:
            return super().forward(hidden_states)
        assert proj.bias is not None  # see `is_usual`
        if device.type == "cuda":  # an epilogue of cuBLASLt
            rows = hidden_states.reshape(-1, proj.in_features)
            product = torch._addmm_activation(proj.bias, rows, proj.weight.t(), use_gelu=True)
            return product.reshape(*hidden_states.shape[:-1], proj.out_features)
        if device.type == "cpu" and onednn.has_onednn(hidden_states.dtype):
            return onednn.linear(hidden_states, proj.weight, proj.bias, "gelu")
        return super().forward(hidden_states)


def gelu_in_fp8(x: torch.Tensor) -> FP8Rows:
    """Apply GELU, in its tanh approximation, to bfloat16 `[..., features]`, and quantize the result.

    On a GPU, this is one kernel, which reads and writes every number once. It rounds to bfloat16 in between, as the
    two would, but what it rounds is nearer to GELU: PyTorch's form loses digits of small numbers. One code in 70000
    differs, by a step.
    """
    if uses_fused_kernels(x):
        codes, scale = gelu_rows_in_fp8(x.reshape(-1, x.shape[-1]))
        return FP8Rows(codes, scale, x.shape)
    return FP8Rows.of(F.gelu(x, approximate="tanh"))
