"""The columns beside a rank's own, where several ranks share a picture."""

import torch

from ...parallel.columns import ColumnSplit


def put_beside(frames: torch.Tensor, split: ColumnSplit) -> torch.Tensor:
    """
    Put a column of each neighbor's on either side of this rank's columns (or rows); zeros where there is no neighbor.

    Args:
        frames: This rank's part, `[B, T, H, W, C]`.
        split: Who has which columns.
    """
    before, after = split.exchange_edges(frames.movedim(-1, 1), 1, 1)
    axis = split.axis - 1  # the channels come last
    nothing = torch.zeros_like(frames.narrow(axis, 0, 1))
    edges = [edge.movedim(1, -1) if edge.numel() else nothing for edge in (before, after)]
    return torch.cat([edges[0], frames, edges[1]], dim=axis)
