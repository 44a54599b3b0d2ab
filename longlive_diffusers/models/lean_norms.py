"""The norms of a block, and the additions to its residual stream, in training: what they keep for the backward is
their input, in the dtype that it has, and what they make of it is made again there.

By itself, autograd keeps the input of a norm in float32 and, to differentiate the modulation, what the norm made of
it: 24 bytes a number and norm, in place of 2 where the stream between blocks is in bfloat16. Results are those of
`fused.residual` and of `nn.RMSNorm`, to the last bit, and gradients are those of autograd, within rounding.

While compiling, the compiler decides what is kept, and without gradients nothing is: the plain functions are called.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..fp8.rows import FP8Rows
from ..fused import residual
from ..fused.layers import is_plain
from .saved_recipes import in_plain_autograd, saved_as_recipe


Gradients = tuple[torch.Tensor | None, ...]


def norm(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize and modulate tokens; see [`fused.residual.norm`]."""
    if in_plain_autograd():
        return _Norm.apply(hidden_states, weight, bias, eps)
    return residual.norm(hidden_states, weight, bias, eps=eps)


def add_and_norm(
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to the residual stream, then normalize and modulate; see [`fused.residual.add_and_norm`]."""
    if in_plain_autograd():
        return _AddAndNorm.apply(hidden_states, update, weight, bias, gate, eps)
    return residual.add_and_norm(hidden_states, update, gate, weight, bias, eps=eps)


def add(
    hidden_states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None, *, dtype: torch.dtype
) -> torch.Tensor:
    """Return `hidden_states + gate * update` in `dtype`; see [`fused.residual.add`]."""
    if gate is not None and in_plain_autograd():  # a sum by itself keeps nothing
        return _Add.apply(hidden_states, update, gate, dtype)
    return residual.add(hidden_states, update, gate, dtype=dtype)


def rms_norm(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Call a layer that normalizes queries or keys, and return its result in the dtype of its input: autocast
    normalizes in float32 on a GPU, but attention takes queries, keys and values of one dtype."""
    is_usual = is_plain(layer, nn.RMSNorm, states.device) and layer.weight is not None and layer.eps is not None
    if is_usual and in_plain_autograd():
        return _RMSNorm.apply(states, layer.weight, layer)
    return layer(states).type_as(states)


def remade_in_backward(
    normed: torch.Tensor | FP8Rows, *parts: torch.Tensor | None, eps: float
) -> AbstractContextManager[None]:
    """
    Within this, layers that would keep `normed` for the gradients of their weights keep `parts` instead, of which it
    is made again.

    Args:
        normed: What [`norm`] or [`add_and_norm`] returned; in FP8, it has no gradients.
        parts: What it was made of: the arguments of that call.
        eps: Its `eps`.
    """
    if isinstance(normed, FP8Rows):
        return nullcontext()
    given = [part for part in parts if part is not None]  # there may be no gate
    return saved_as_recipe(normed, partial(_remake, normed.dtype, eps), *given)


def _remake(dtype: torch.dtype, eps: float, *parts: torch.Tensor) -> torch.Tensor:
    if len(parts) == 3:
        return residual.norm(*parts, eps=eps).to(dtype)
    hidden_states, update, *gate, weight, bias = parts
    return residual.add_and_norm(hidden_states, update, gate[0] if gate else None, weight, bias, eps=eps)[1]


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float):
        ctx.save_for_backward(hidden_states, weight)
        ctx.eps, ctx.bias_shape = eps, bias.shape
        return residual.norm(hidden_states, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        hidden_states, weight = ctx.saved_tensors
        found = _norm_gradients(residual.wide(hidden_states), weight, ctx.bias_shape, ctx.eps, gradient)
        return found[0].to(hidden_states.dtype), *found[1:], None


class _AddAndNorm(Function):
    """Keeps the sum where its parts are not worth more: without a gate, the update is needed for nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        update: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        gate: torch.Tensor | None,
        eps: float,
    ):
        added, normed = residual.add_and_norm(hidden_states, update, gate, weight, bias, eps=eps)
        ctx.save_for_backward(*((added,) if gate is None else (hidden_states, update, gate)), weight)
        ctx.dtypes, ctx.eps, ctx.bias_shape = (hidden_states.dtype, update.dtype), eps, bias.shape
        return added, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, added_gradient: torch.Tensor, normed_gradient: torch.Tensor) -> Gradients:
        *parts, weight = ctx.saved_tensors
        added = parts[0] if len(parts) == 1 else residual.add(*parts, dtype=added_gradient.dtype)
        hidden_gradient, *of_norm = _norm_gradients(added, weight, ctx.bias_shape, ctx.eps, normed_gradient)
        gradient = hidden_gradient.add_(added_gradient)
        hidden_dtype, update_dtype = ctx.dtypes
        if len(parts) == 1:
            of_update, of_gate = gradient.to(update_dtype), None
        else:
            of_update, of_gate = _gated_gradients(gradient, parts[1], parts[2])
        return gradient.to(hidden_dtype), of_update, *of_norm, of_gate, None


class _Add(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(update, gate)
        ctx.dtype = hidden_states.dtype
        return residual.add(hidden_states, update, gate, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        update, gate = ctx.saved_tensors
        return gradient.to(ctx.dtype), *_gated_gradients(residual.wide(gradient), update, gate), None


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, layer: nn.RMSNorm) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.eps = layer.eps
        return layer(states).type_as(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        states, weight = ctx.saved_tensors
        wide, gradient = residual.wide(states), residual.wide(gradient)
        scale = wide.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
        normed = wide * scale
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = gradient * weight
        gradient = (gradient - normed * (gradient * normed).mean(-1, keepdim=True)).mul_(scale)
        return gradient.to(states.dtype), weight_gradient, None


def _norm_gradients(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias_shape: torch.Size, eps: float, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the input, the weight and the bias of [`fused.residual.norm`], of which `hidden_states`
    is the input and `gradient` that of the result; all in the dtype of `hidden_states`, but for the weight's and the
    bias's in the weight's."""
    dim = hidden_states.shape[-1:]
    normed, mean, scale = torch.native_layer_norm(hidden_states, dim, None, None, eps)
    gradient = gradient.to(hidden_states.dtype)
    frames = weight.shape[1] if weight.ndim > 1 else 1  # one weight and bias for all frames, or one for each
    by_frame, normed_by_frame = (states.unflatten(1, (frames, -1)) for states in (gradient, normed))
    bias_gradient = by_frame.sum(2, keepdim=True).sum_to_size(bias_shape)
    weight_gradient = (by_frame * normed_by_frame).sum(2, keepdim=True).sum_to_size(weight.shape)
    gradient = (by_frame * weight).flatten(1, 2)
    gradient, _, _ = torch.ops.aten.native_layer_norm_backward(
        gradient, hidden_states, dim, mean, scale, None, None, [True, False, False]
    )
    return gradient, weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype)


def _gated_gradients(
    gradient: torch.Tensor, update: torch.Tensor, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the update and of its gate, `gradient` being that of the sum."""
    by_frame, update_by_frame = (states.unflatten(1, (gate.shape[1], -1)) for states in (gradient, update))
    of_gate = (by_frame * update_by_frame).sum(2, keepdim=True).sum_to_size(gate.shape)
    return (by_frame * gate).flatten(1, 2).to(update.dtype), of_gate.to(gate.dtype)
