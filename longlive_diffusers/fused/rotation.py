"""Between the projections of queries, keys and values and attention to the KV cache: RMS norm, rotation, and writing
keys and values to their slots. On a GPU, this is one kernel, in place of some twenty."""

from dataclasses import dataclass

import torch
from torch import nn

from . import operators
from .layers import is_plain, uses_fused_kernels


@dataclass(frozen=True)
class CodeFactors:
    """What numbers are multiplied by before they are rounded to E4M3, float32 `[B, heads]` each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Destination:
    """
    Where the keys and values of a chunk go.

    Args:
        keys, values: `[B, heads, slots * tokens, head_dim]`, of which whole heads' last dimension is dense.
        token_slots: The place of each token in them, int64 `[B, num_frames * tokens]`.
        raw_keys: Where keys are kept that are not rotated, `[B, heads, frames, tokens, head_dim]`, or None.
        raw_slots: In which frame of these each frame goes, int64 `[B, num_frames]`, or None.
        factors: Where keys and values are codes in E4M3 (uint8): how they and the queries become codes.
    """

    keys: torch.Tensor
    values: torch.Tensor
    token_slots: torch.Tensor
    raw_keys: torch.Tensor | None = None
    raw_slots: torch.Tensor | None = None
    factors: CodeFactors | None = None


def can_norm_rotate_and_write(query_norm: nn.Module, key_norm: nn.Module, query: torch.Tensor) -> bool:
    """Whether [`norm_rotate_and_write`] can take the place of calling the norms."""
    norms = (query_norm, key_norm)
    return uses_fused_kernels(query) and all(
        is_plain(norm, nn.RMSNorm, query.device) and norm.weight is not None and norm.eps is not None for norm in norms
    )


def norm_rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_norm: nn.RMSNorm,
    key_norm: nn.RMSNorm,
    rotary: torch.Tensor,
    destination: Destination,
) -> torch.Tensor:
    """
    Normalize and rotate queries and keys, and write keys and values to the cache.

    Args:
        query, key, value: What the projections gave, `[B, tokens, dim]`.
        query_norm, key_norm: The norms, over all heads together, both with one `eps`.
        rotary: As for `rotary.apply_rotary`, `[B or 1, tokens, 1, head_dim / 2, 2]`.
        destination: Where keys and values go.

    Returns:
        The queries, `[B, tokens, heads, head_dim]`; codes (uint8), where the destination has factors.
    """
    factors = destination.factors
    return operators.norm_rotate_and_write(
        query,
        key,
        value,
        query_norm.weight,
        key_norm.weight,
        query_norm.eps,
        rotary,
        destination.keys,
        destination.values,
        destination.token_slots,
        destination.raw_keys,
        destination.raw_slots,
        *((None, None, None) if factors is None else (factors.query, factors.key, factors.value)),
    )
