"""Unmasked attention: with any attention backend of diffusers, over a history in parts that are not copied for the
backward, or with plain matrix products where these are the fastest option on a CPU.
"""

import math

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch.profiler import record_function
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .flex import flex_attend
from .saved_recipes import Recipe, in_plain_autograd, save_recipes
from .sdpa_kernels import kernel_named


MATMUL_ATTENTION = "longlive_diffusers::matmul_attention"
_SCORE_BYTES = 6 * 2**20  # of a block of scores, which so stays in the processor's cache between the products
_BYTES_OF_LARGE_HEADS = 2**20  # of the scores of one head; from here on, heads are multiplied one by one


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    backend: AttentionBackendName | None = None,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute unmasked attention, `[B, tokens, heads, head_dim]`, with `backend` (None: diffusers' active one);
    `scratch` is one from [`allocate_scratch`]."""
    if backend is None and _prefers_matmul(query):
        if torch.compiler.is_compiling():  # it would copy a buffer that an operator writes to, for each call
            return _uncompiled_matmul_attention(query, key, value)
        with record_function(MATMUL_ATTENTION):  # a profiler could not tell its products from a linear layer's
            return _matmul_attention(query, key, value, scratch)
    # A member of the enum already: making one of its value stops the compiler (seen on Python 3.12 with torch 2.11).
    name = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
    if name == AttentionBackendName.FLEX:
        return flex_attend(query, key, value)
    if (kernel := kernel_named(name)) is not None:
        return kernel(*(states.transpose(1, 2) for states in (query, key, value))).transpose(1, 2)
    return dispatch_attention_fn(query, key, value, backend=backend)


def attend_joined(
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    backend: AttentionBackendName | None = None,
) -> torch.Tensor:
    """
    Call [`attend`] on `keys` and `values` concatenated along tokens; the backward does not keep the copies.

    A clip of n chunks is concatenated n times, each time with all the history so far. Keeping these copies would take
    O(n^2) memory, whereas the parts are slices of tensors that other nodes of the graph keep anyway.
    """
    keys, values = ([part for part in parts if part.shape[1]] for parts in (keys, values))
    if len(keys) == 1:
        return attend(query, keys[0], values[0], backend)
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return checkpoint(
            _attend_to_parts, query, keys, values, backend, use_reentrant=False, context_fn=_keep_attention_only
        )
    key, value = _join(keys), _join(values)
    if not in_plain_autograd():
        return attend(query, key, value, backend)
    with save_recipes((key, Recipe(_join, keys)), (value, Recipe(_join, values))):
        return attend(query, key, value, backend)


def _attend_to_parts(query, keys, values, backend):
    return attend(query, _join(keys), _join(values), backend)


def _keep_attention_only():
    """Let the compiler keep what attention returns, which its backward needs, but concatenate again in the backward:
    by itself it keeps the concatenations, like eager autograd would."""
    return create_selective_checkpoint_contexts(_is_kept)


def _is_kept(context, operator, *args, **kwargs) -> CheckpointPolicy:
    computes_attention = operator.namespace != "aten" or "attention" in operator.name()
    return CheckpointPolicy.MUST_SAVE if computes_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate along tokens; contiguous, so that the strides of a view do not depend on those of the parts."""
    return torch.cat(parts, dim=1).contiguous()


def _prefers_matmul(query: torch.Tensor) -> bool:
    """Whether to compute attention with matrix products.

    PyTorch's fused bfloat16 attention was measured to multiply at float32 speed on a CPU without AMX; matrix products
    do not. The price is that scores are rounded to bfloat16, like everything around them.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    )


def allocate_scratch(dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Allocate what calls of [`attend`] that run one after the other can compute their scores in, instead of in a
    buffer each; None where they need none."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return None
    return torch.empty(_SCORE_BYTES // dtype.itemsize, dtype=dtype)


def _matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scratch: torch.Tensor | None
) -> torch.Tensor:
    """Compute attention in blocks of queries, whose scores share one buffer (`scratch`, or one of this call's), small
    enough to be reused; large heads one by one, because a batched product copies the keys for each block of
    queries."""
    batch, num_queries, heads, head_dim = query.shape
    scaled = query * head_dim**-0.5
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (scaled, key, value))  # [B * heads, ...]
    row_bytes = key.shape[1] * key.element_size()
    num_rows = min(num_queries, max(1, _SCORE_BYTES // row_bytes))
    by_head = row_bytes * num_rows >= _BYTES_OF_LARGE_HEADS
    num_heads = 1 if by_head else min(batch * heads, max(1, _SCORE_BYTES // (row_bytes * num_rows)))
    num_scores = num_heads * num_rows * key.shape[1]
    buffer = query.new_empty(num_scores) if scratch is None or scratch.numel() < num_scores else scratch
    output = query.new_empty(query.shape)
    product = torch.mm if by_head else torch.bmm
    parts = (states.unbind() if by_head else states.split(num_heads) for states in (query, key, value, output))
    for queries, keys, values, outputs in zip(*parts, strict=True):
        for rows, result in zip(queries.split(num_rows, dim=-2), outputs.split(num_rows, dim=-2), strict=True):
            shape = (*rows.shape[:-1], keys.shape[-2])
            scores = buffer[: math.prod(shape)].view(shape)
            product(rows, keys.transpose(-1, -2), out=scores)
            torch.softmax(scores, dim=-1, out=scores)
            product(scores, values, out=result)
    return output.unflatten(0, (batch, heads)).transpose(1, 2).contiguous()


@torch.library.custom_op(MATMUL_ATTENTION, mutates_args=())
def _uncompiled_matmul_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[`_matmul_attention`] as an operator, which `torch.compile` leaves as it is: the compiler cannot trace the
    shared buffer, and the code it generated from the same products without one was slower, measured alone at the
    benchmark's shape. It has no argument that is written to: the compiler fails on one that is None (torch 2.13)."""
    return _matmul_attention(query, key, value, None)


@_uncompiled_matmul_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)
