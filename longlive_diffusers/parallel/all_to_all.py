"""The all-to-all of Ulysses (arXiv 2309.14509): from all heads of some tokens to some heads of all tokens, and back.

Both directions are the same exchange with two dimensions swapped: one is split over the ranks, the other is gathered
from them in the order of ranks. Hence each direction is the other's inverse, and its backward pass.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .layout import check_heads


def scatter_heads(states: torch.Tensor, ranks: DeviceMesh | dist.ProcessGroup) -> torch.Tensor:
    """
    Scatter heads, gather tokens; differentiable. Every rank of the group has to call it, with the same shape.

    Args:
        states: `[B, tokens, ..., heads, head_dim]`, this rank's tokens. Queries, keys and values can go together, as
            `[B, tokens, 3, heads, head_dim]`.
        ranks: N ranks: a one-dimensional device mesh, or a process group.

    Returns:
        `[B, N * tokens, ..., heads / N, head_dim]`: the tokens of all ranks, those of rank 0 first.

    Raises:
        ValueError: If N does not divide the number of heads.
    """
    check_heads(states.shape[-2], ranks.size())
    return _AllToAll.apply(states, states.ndim - 2, 1, _group_of(ranks))


def gather_heads(states: torch.Tensor, ranks: DeviceMesh | dist.ProcessGroup) -> torch.Tensor:
    """
    The inverse of [`scatter_heads`]: gather heads, scatter tokens; differentiable.

    Args:
        states: `[B, N * tokens, ..., heads / N, head_dim]`, this rank's heads.
        ranks: As in [`scatter_heads`].

    Returns:
        `[B, tokens, ..., heads, head_dim]`, this rank's tokens.

    Raises:
        ValueError: If N does not divide the number of tokens.
    """
    if states.shape[1] % ranks.size():
        raise ValueError(f"{states.shape[1]} tokens cannot be scattered over {ranks.size()} ranks.")
    return _AllToAll.apply(states, 1, states.ndim - 2, _group_of(ranks))


def gather_parts(states: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Return what each rank of the group has, in their order; all of one shape. Not differentiable."""
    parts = [torch.empty_like(states, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, states.contiguous(), group=group)
    return parts


def _group_of(ranks: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    return ranks.get_group() if isinstance(ranks, DeviceMesh) else ranks


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: torch.Tensor, split_dim: int, gather_dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.split_dim, ctx.gather_dim, ctx.group = split_dim, gather_dim, group
        num_ranks = dist.get_world_size(group)
        outgoing = states.unflatten(split_dim, (num_ranks, -1)).movedim(split_dim, 0).contiguous()  # [N, ...]
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
        return incoming.movedim(0, gather_dim).flatten(gather_dim, gather_dim + 1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _AllToAll.apply(gradient, ctx.gather_dim, ctx.split_dim, ctx.group), None, None, None
