"""PyTorch's own attention kernels, by their names in diffusers, each called directly.

diffusers selects one of them by `torch.nn.attention.sdpa_kernel`, which forbids all others for the time of the call:
in the whole process, not in the calling thread. A VAE that decodes in another thread meanwhile (its attention has a
single head of 1024 channels, which most kernels do not support) finds the only kernel it could use forbidden.
"""

from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import AttentionBackendName


aten = torch.ops.aten


def kernel_named(backend: str) -> Callable[..., torch.Tensor] | None:
    """Return the kernel that a name stands for, which takes and returns `[B, heads, tokens, head_dim]`; None if it is
    not the name of one of PyTorch's kernels."""
    return _KERNELS.get(backend)


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return aten._scaled_dot_product_cudnn_attention(query, key, value, None, _is_differentiated(query, key, value))[0]


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    needs_sums = _is_differentiated(query, key, value)
    return aten._scaled_dot_product_efficient_attention(query, key, value, None, needs_sums)[0]


def _math(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return aten._scaled_dot_product_attention_math(query, key, value)[0]


def _is_differentiated(*states: torch.Tensor) -> bool:
    """Whether a backward will come, which needs the logarithms of the sums of exponentials."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states)


_KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    AttentionBackendName._NATIVE_FLASH: _flash,
    AttentionBackendName._NATIVE_CUDNN: _cudnn,
    AttentionBackendName._NATIVE_EFFICIENT: _efficient,
    AttentionBackendName._NATIVE_MATH: _math,
}
