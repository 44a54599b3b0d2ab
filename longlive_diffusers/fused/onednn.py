"""oneDNN, with which PyTorch multiplies on a CPU: whether it is there, and its linear layer."""

import torch


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether PyTorch was built with oneDNN, and this CPU can compute in `dtype` with it."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Compute a linear layer, whose weight may lie as oneDNN has it, and then, if `activation` is "gelu" and not
    "none", GELU in its tanh approximation."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "tanh")
