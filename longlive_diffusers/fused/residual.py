"""The residual stream of a block: within the block it is in float32, and each addition to it ends in the norm of the
next layer's input.

    add_and_norm:  hidden_states += gate * update;  normed = layer_norm(hidden_states) * weight + bias

On a GPU, this is one kernel, which reads and writes every number once: 12 bytes of each in bfloat16, in place of 36.
Where the layer multiplies in FP8, the kernel also quantizes its input, which is then never in memory in bfloat16; the
bits are those of the two one after the other, as the kernel rounds to bfloat16 in between.
"""

import torch
import torch.nn.functional as F

from ..fp8.rows import FP8Rows
from .layers import uses_fused_kernels
from .operators import add_and_norm_rows, add_and_norm_rows_in_fp8, add_rows, norm_rows, norm_rows_in_fp8


def norm(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """
    Normalize and modulate tokens.

    Args:
        hidden_states: The residual stream, `[B, frames * tokens, dim]`.
        weight, bias: Those of the normalized numbers, float32 `[B, frames, 1, dim]`: each frame has its own.
        eps: Added to the variance.

    Returns:
        `[B, frames * tokens, dim]`, in the dtype of `hidden_states`.
    """
    if uses_fused_kernels(hidden_states):
        return norm_rows(hidden_states, weight, bias, eps)
    return _plain_norm(wide(hidden_states), weight, bias, eps).to(hidden_states.dtype)


def norm_in_fp8(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> FP8Rows:
    """Compute [`norm`] in bfloat16, and quantize it."""
    if uses_fused_kernels(hidden_states):
        codes, scale = norm_rows_in_fp8(hidden_states, weight, bias, eps)
        return FP8Rows(codes, scale, hidden_states.shape)
    return FP8Rows.of(norm(hidden_states, weight, bias, eps=eps).bfloat16())


def add_and_norm(
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Add to the residual stream, then normalize and modulate.

    Args:
        hidden_states: The residual stream, `[B, frames * tokens, dim]`.
        update: What is added to it, of the same shape; its dtype is that of the normalized result.
        gate: The factor of the update, float32 `[B, frames, 1, dim]`; None: 1.
        weight, bias: Those of the normalized numbers: `[B, frames, 1, dim]`, or `[dim]` for all frames.
        eps: Added to the variance.

    Returns:
        The residual stream, float32, and its normalized tokens in the dtype of `update`; both `[B, frames * tokens,
        dim]`.
    """
    if uses_fused_kernels(hidden_states):
        return add_and_norm_rows(hidden_states, update, gate, weight, bias, eps)
    hidden_states = add(hidden_states, update, gate, dtype=wide(hidden_states).dtype)
    return hidden_states, _plain_norm(hidden_states, weight, bias, eps).to(update.dtype)


def add_and_norm_in_fp8(
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, FP8Rows]:
    """Compute [`add_and_norm`], its normalized tokens in bfloat16, and quantize these."""
    if uses_fused_kernels(hidden_states):
        added, codes, scale = add_and_norm_rows_in_fp8(hidden_states, update, gate, weight, bias, eps)
        return added, FP8Rows(codes, scale, hidden_states.shape)
    added, normed = add_and_norm(hidden_states, update, gate, weight, bias, eps=eps)
    return added, FP8Rows.of(normed.bfloat16())


def add(
    hidden_states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None, *, dtype: torch.dtype
) -> torch.Tensor:
    """Return `hidden_states + gate * update`, computed in float32, in `dtype`; see [`add_and_norm`]."""
    if gate is not None and uses_fused_kernels(hidden_states):
        return add_rows(hidden_states, update, gate, dtype)
    hidden_states = wide(hidden_states)
    if gate is None:
        return (hidden_states + update).to(dtype)
    by_frame, update = (states.unflatten(1, (gate.shape[1], -1)) for states in (hidden_states, update))
    return torch.addcmul(by_frame, update, gate).flatten(1, 2).to(dtype)


def wide(states: torch.Tensor) -> torch.Tensor:
    """Return numbers as the residual stream has them, in float32; float64 stays as it is."""
    return states if states.dtype == torch.float64 else states.float()


def modulate(normed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `normed * weight + bias`, with `[B, frames, 1, dim]` applied to every token of its frame."""
    return torch.addcmul(bias, normed.unflatten(1, (weight.shape[1], -1)), weight).flatten(1, 2)


def _plain_norm(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    dim = hidden_states.shape[-1:]
    if weight.ndim == 1:
        return F.layer_norm(hidden_states, dim, weight.to(hidden_states), bias.to(hidden_states), eps)
    return modulate(F.layer_norm(hidden_states, dim, eps=eps), weight, bias)
