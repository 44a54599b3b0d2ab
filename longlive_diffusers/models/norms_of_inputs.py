"""The norms of a block, each of which makes the input of one module: of its attention or feed-forward layers. Where
all that reads the input takes it in FP8, the norm gives it so."""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_wan import WanAttention

from ..fp8.rows import FP8Rows
from ..fused import residual
from ..fused.layers import is_compiled, uses_fused_kernels
from ..nvfp4.together import take_fp8
from . import attention, fp8_feed_forward, lean_norms


Reader = WanAttention | FeedForward


def norm_for(
    reader: Reader, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float
) -> torch.Tensor | FP8Rows:
    """Normalize and modulate tokens for a module, which alone reads them; see [`fused.residual.norm`]."""
    if reads_fp8(reader, hidden_states):
        return residual.norm_in_fp8(hidden_states, weight, bias, eps=eps)
    return lean_norms.norm(hidden_states, weight, bias, eps=eps)


def add_and_norm_for(
    reader: Reader,
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | FP8Rows]:
    """Add to the residual stream, then normalize and modulate for a module, which alone reads the normalized tokens;
    see [`fused.residual.add_and_norm`]."""
    if reads_fp8(reader, update):
        return residual.add_and_norm_in_fp8(hidden_states, update, gate, weight, bias, eps=eps)
    return lean_norms.add_and_norm(hidden_states, update, gate, weight, bias, eps=eps)


def reads_fp8(reader: Reader, x: torch.Tensor) -> bool:
    """Whether all that a module does with an input like `x` is to quantize it to FP8, and a fused kernel can do so."""
    if not uses_fused_kernels(x) or is_compiled(reader):
        return False
    if isinstance(reader, FeedForward):
        return take_fp8(fp8_feed_forward.first_layers(reader, x.device), x)
    return take_fp8(attention.first_layers(reader, x.device), x)
