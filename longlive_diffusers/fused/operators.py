"""The fused kernels as operators of torch, which run on a GPU; without Triton they exist, and cannot be run."""

from functools import partial

import torch

from ..eager_operator import eager_operator
from ..fp8.operators import empty_rows, has_fp8_instructions, row_constants
from ..triton_launch import launch_from, next_power_of_two, warps_for


launch = partial(launch_from, f"{__package__}.kernels", fuses=True)


@eager_operator("longlive_diffusers::norm_rows")
def norm_rows(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute [`residual.norm`] in one pass."""
    normed = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    _launch_by_rows(hidden_states, None, None, weight, bias, eps, None, normed)
    return normed


@norm_rows.register_fake
def _(hidden_states, weight, bias, eps) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@eager_operator("longlive_diffusers::norm_rows_in_fp8")
def norm_rows_in_fp8(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute [`residual.norm_in_fp8`] in one pass: codes and scales, as `quantize_rows` returns them."""
    codes, scales = _empty_rows_like(hidden_states)
    _launch_by_rows(hidden_states, None, None, weight, bias, eps, None, codes.view(torch.uint8), scales)
    return codes, scales


@norm_rows_in_fp8.register_fake
def _(hidden_states, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_rows_like(hidden_states)


@eager_operator("longlive_diffusers::add_and_norm_rows")
def add_and_norm_rows(
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute [`residual.add_and_norm`] in one pass."""
    added = torch.empty_like(hidden_states, dtype=torch.float32, memory_format=torch.contiguous_format)
    normed = torch.empty_like(added, dtype=update.dtype)
    _launch_by_rows(hidden_states, update, gate, weight, bias, eps, added, normed)
    return added, normed


@add_and_norm_rows.register_fake
def _(hidden_states, update, gate, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor]:
    added = torch.empty_like(hidden_states, dtype=torch.float32, memory_format=torch.contiguous_format)
    return added, torch.empty_like(added, dtype=update.dtype)


@eager_operator("longlive_diffusers::add_and_norm_rows_in_fp8")
def add_and_norm_rows_in_fp8(
    hidden_states: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute [`residual.add_and_norm_in_fp8`] in one pass: the sum, codes and scales."""
    added = torch.empty_like(hidden_states, dtype=torch.float32, memory_format=torch.contiguous_format)
    codes, scales = _empty_rows_like(hidden_states)
    _launch_by_rows(hidden_states, update, gate, weight, bias, eps, added, codes.view(torch.uint8), scales)
    return added, codes, scales


@add_and_norm_rows_in_fp8.register_fake
def _(hidden_states, update, gate, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    added = torch.empty_like(hidden_states, dtype=torch.float32, memory_format=torch.contiguous_format)
    return added, *_empty_rows_like(hidden_states)


@eager_operator("longlive_diffusers::add_rows")
def add_rows(
    hidden_states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Compute [`residual.add`] in one pass."""
    added = torch.empty_like(hidden_states, dtype=dtype, memory_format=torch.contiguous_format)
    _launch_by_rows(hidden_states, update, gate, None, None, 0.0, added, None)
    return added


@add_rows.register_fake
def _(hidden_states, update, gate, dtype) -> torch.Tensor:
    return torch.empty_like(hidden_states, dtype=dtype, memory_format=torch.contiguous_format)


def _empty_rows_like(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows, dim = hidden_states.shape
    return empty_rows(batch * rows, dim, hidden_states.device)


def _launch_by_rows(hidden_states, update, gate, weight, bias, eps: float, added, normed, scales=None) -> None:
    """Launch the kernel of the operators above; what they do without is None. With `scales`, `normed` is codes."""
    batch, rows, dim = hidden_states.shape
    tensors, strides, frames = [], [], 1
    for tensor in (gate, weight, bias):
        if tensor is not None and tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        if tensor is None or tensor.ndim == 1:
            strides += [0, 0]
        else:
            frames = tensor.shape[1]
            strides += tensor.stride()[:2]
        tensors.append(hidden_states if tensor is None else tensor)
    launch(
        "add_and_norm_kernel", (batch * rows,), hidden_states,
        hidden_states.contiguous(), hidden_states if update is None else update.contiguous(), *tensors,
        *(hidden_states if result is None else result for result in (added, normed, scales)),
        rows, rows // frames, dim, *strides, eps,
        ADDS=update is not None, GATED=gate is not None, NORMS=normed is not None, QUANTIZES=scales is not None,
        **row_constants(dim, hidden_states.device),
    )  # fmt: skip


@eager_operator("longlive_diffusers::gelu_rows_in_fp8")
def gelu_rows_in_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute [`feed_forward.gelu_in_fp8`] of `[rows, columns]` in one pass: codes and scales, as `quantize_rows`
    returns them."""
    rows, columns = x.shape
    codes, scales = empty_rows(rows, columns, x.device)
    launch(
        "gelu_in_fp8_kernel", (rows,), x,
        x.contiguous(), codes.view(torch.uint8), scales, columns, **row_constants(columns, x.device),
    )  # fmt: skip
    return codes, scales


@gelu_rows_in_fp8.register_fake
def _(x) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    return empty_rows(rows, columns, x.device)


@eager_operator(
    "longlive_diffusers::norm_rotate_and_write", mutates_args=("key_cache", "value_cache", "raw_key_cache")
)
def norm_rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    eps: float,
    rotary: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    token_slots: torch.Tensor,
    raw_key_cache: torch.Tensor | None,
    raw_slots: torch.Tensor | None,
    query_factor: torch.Tensor | None = None,
    key_factor: torch.Tensor | None = None,
    value_factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Compute [`rotation.norm_rotate_and_write`] in one pass.

    Args:
        query, key, value: What the projections gave, `[B, tokens, dim]`; parts of what one layer gave need no copies.
        query_weight, key_weight: The weights of the RMS norms, `[dim]`.
        eps: Added to the mean of squares.
        rotary: Cosines and sines, float32 `[B or 1, tokens, 1, head_dim / 2, 2]`.
        key_cache, value_cache: `[B, heads, slots, head_dim]`, written at `token_slots`; the last dimension is dense.
        token_slots: Where each token goes, int64 `[B, tokens]`.
        raw_key_cache: Where keys go that are not rotated, `[B, heads, frames, tokens of a frame, head_dim]`, or None.
        raw_slots: In which frame of it each frame goes, int64 `[B, num_frames]`, or None.
        query_factor, key_factor, value_factor: Where the caches are uint8, and get codes in E4M3: what is multiplied
            before, float32 `[B, heads]`, dense.

    Returns:
        The normalized, rotated queries, `[B, tokens, heads, head_dim]`, in the dtype of `query`; or their codes.
    """
    batch, tokens, dim = query.shape
    heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    result = torch.empty(
        batch, tokens, heads, head_dim, dtype=_rotated_dtype(query, query_factor), device=query.device
    )
    rotated, factors = result, (query_factor, key_factor, value_factor)
    if query_factor is not None:  # two codes are written at once
        rotated, key_cache, value_cache = (codes.view(torch.int16) for codes in (result, key_cache, value_cache))
    states = [in_rows(own) for own in (query, key, value)]
    raw = key_cache if raw_key_cache is None else raw_key_cache
    raw_strides = (0, 0, 0, 0) if raw_key_cache is None else raw_key_cache.stride()[:4]
    launch(
        "norm_rotate_and_write_kernel", (batch * tokens, 3), query,
        *states, query_weight, key_weight, rotary.contiguous(),
        rotated, key_cache, value_cache, token_slots.contiguous(),
        raw, token_slots if raw_slots is None else raw_slots.contiguous(),
        *(query_weight if factor is None else factor for factor in factors),
        tokens, dim, *(own.stride(1) for own in states), 0 if rotary.shape[0] == 1 else tokens * head_dim,
        *key_cache.stride()[:3], *value_cache.stride()[:3], *raw_strides,
        1 if raw_slots is None else raw_slots.shape[1], eps,
        BLOCK=next_power_of_two(dim), HEAD_DIM=head_dim, KEEPS_RAW=raw_key_cache is not None,
        CODES=query_factor is not None, PTX=has_fp8_instructions(query.device), num_warps=warps_for(dim),
    )  # fmt: skip
    return result


@norm_rotate_and_write.register_fake
def _(
    query, key, value, query_weight, key_weight, eps, rotary, key_cache, value_cache, token_slots, raw_key_cache,
    raw_slots, query_factor=None, key_factor=None, value_factor=None,
) -> torch.Tensor:  # fmt: skip
    shape = (*query.shape[:2], key_cache.shape[1], key_cache.shape[3])
    return query.new_empty(shape, dtype=_rotated_dtype(query, query_factor))


def in_rows(states: torch.Tensor) -> torch.Tensor:
    """Return `[B, tokens, dim]`, copied unless each token is dense and they all lie in steps of `stride(1)`."""
    batch, tokens, _ = states.shape
    is_even = states.stride(2) == 1 and (batch == 1 or states.stride(0) == tokens * states.stride(1))
    return states if is_even else states.contiguous()


def _rotated_dtype(query: torch.Tensor, query_factor: torch.Tensor | None) -> torch.dtype:
    return query.dtype if query_factor is None else torch.uint8


@eager_operator("longlive_diffusers::decode_heads")
def decode_heads(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute [`decode.decode_heads`] in one pass."""
    batch, tokens, heads, head_dim = codes.shape
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    dim = heads * head_dim
    launch(
        "decode_heads_kernel", (batch * tokens,), codes,
        codes.contiguous(), scale.contiguous(), result, tokens, dim, head_dim,
        BLOCK=next_power_of_two(dim), num_warps=warps_for(dim),
    )  # fmt: skip
    return result


@decode_heads.register_fake
def _(codes, scale, dtype) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)
