"""One unmasked attention call: by any backend of diffusers, over a history in parts that the backward does not copy,
and by matrix products where these are the fastest way on a CPU.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn


_SCORE_BYTES = 16 * 2**20  # of a block of scores; larger allocations go back to the system each time, which costs more


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """Unmasked attention, `[B, tokens, heads, head_dim]`, by `backend` (None: diffusers' active one)."""
    if backend is None and _prefers_matmul(query):
        return _matmul_attention(query, key, value)
    return dispatch_attention_fn(query, key, value, backend=backend)


def attend_joined(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], backend: str | None = None
) -> torch.Tensor:
    """[`attend`] to the concatenation of `keys` and of `values` along tokens, which the backward does not keep."""
    keys, values = ([part for part in parts if part.shape[1]] for parts in (keys, values))
    if len(keys) == 1:
        return attend(query, *keys, *values, backend)
    key, value = _join(keys), _join(values)
    if not in_plain_autograd():
        return attend(query, key, value, backend)
    with _save_parts_of({_storage(key): keys, _storage(value): values}):
        return attend(query, key, value, backend)


@dataclass(frozen=True)
class _Joined:
    """Stands in the graph for a view of a concatenation along tokens: what it was made of, and which view."""

    parts: list
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def _save_parts_of(parts: dict[int, list[torch.Tensor]]) -> Iterator[None]:
    """
    Save, for backward, the parts of concatenated tensors (found by their storage) in place of these, and concatenate
    them again when they are needed: the same bits, and no attention is computed twice.

    A clip of n chunks is concatenated n times, each time with all the history so far; kept, that would be O(n^2)
    memory, where the parts are slices of tensors that other nodes of the graph keep anyway. Everything that is saved
    still goes through the hooks that were there before (gradient checkpointing is a pair of them, and would keep all
    of a layer if a pair in front of it took the tensors away), which is why these are looked up.
    """
    outer_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack, outer_unpack = outer_hooks or (_identity, _identity)

    def pack(tensor: torch.Tensor):
        if _storage(tensor) not in parts:
            return outer_pack(tensor)
        packed = [outer_pack(part.detach()) for part in parts[_storage(tensor)]]
        return _Joined(packed, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(saved) -> torch.Tensor:
        if not isinstance(saved, _Joined):
            return outer_unpack(saved)
        whole = _join([outer_unpack(part) for part in saved.parts])
        return whole.as_strided(saved.size, saved.stride, saved.offset)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        parts.clear()  # the graph may keep `pack`, which must not keep them


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Along tokens; contiguous, so that a view's strides mean the same again whatever those of the parts are then."""
    return torch.cat(parts, dim=1).contiguous()


def in_plain_autograd() -> bool:
    """Not where a compiler decides what is saved, where nothing is, or under a transform of `torch.func`, which
    forbids hooks and needs more of a function than a backward."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()
    )


def _storage(tensor: torch.Tensor) -> int:
    """Which storage it is a view of; unlike an address, of its own on the meta device too."""
    return tensor.untyped_storage()._cdata


def _identity(saved):
    return saved


def _prefers_matmul(query: torch.Tensor) -> bool:
    """On a CPU without AMX, PyTorch's fused bfloat16 attention multiplies at float32 speed; matrix products do not.

    What they cost is that scores are rounded to bfloat16, as everything around them is.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    )


@torch.library.custom_op("longlive_diffusers::matmul_attention", mutates_args=())
def _matmul_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention in blocks of heads and queries, whose scores share one buffer that is small enough to be reused.

    An operator of its own, so that `torch.compile` leaves it as it is: it cannot trace the shared buffer, and what it
    makes of the same products without one was slower, by itself, at the benchmark's shape.
    """
    batch, num_queries, heads, head_dim = query.shape
    scaled = query * head_dim**-0.5
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (scaled, key, value))  # [B * heads, ...]
    row_bytes = key.shape[1] * key.element_size()
    num_rows = min(num_queries, max(1, _SCORE_BYTES // row_bytes))
    num_heads = min(batch * heads, max(1, _SCORE_BYTES // (row_bytes * num_rows)))
    buffer = query.new_empty(num_heads * num_rows * key.shape[1])
    output = query.new_empty(query.shape)
    blocks = zip(*(states.split(num_heads) for states in (query, key, value, output)), strict=True)
    for queries, keys, values, outputs in blocks:
        for rows, result in zip(queries.split(num_rows, dim=1), outputs.split(num_rows, dim=1), strict=True):
            shape = (*rows.shape[:2], keys.shape[1])
            scores = buffer[: math.prod(shape)].view(shape)
            torch.bmm(rows, keys.transpose(1, 2), out=scores)
            torch.softmax(scores, dim=-1, out=scores)
            torch.bmm(scores, values, out=result)
    return output.unflatten(0, (batch, heads)).transpose(1, 2).contiguous()


@_matmul_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)
