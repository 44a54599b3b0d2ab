"""The mean loss of a clip whose frames are on several ranks."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def group_mean(
    local_sum: torch.Tensor, local_count: torch.Tensor | float, mesh: DeviceMesh | None = None
) -> torch.Tensor:
    """
    This rank's share of a mean over everything the ranks of `mesh` hold: `N * local_sum / count of all ranks`.

    DDP and FSDP average gradients over ranks, so what a rank back-propagates has to be its part of the sum, times N:
    then the average over ranks is the gradient of `sum over ranks / count over ranks`, the single-process loss. Ranks
    need not have equal counts (a clip padded at its end leaves the last ranks less), and one may have none: it still
    has to run the backward, whose collectives the others wait for, and does so with a gradient of zero.

    Args:
        local_sum: Scalar, sum of the losses of this rank's valid elements.
        local_count: How many (or of what weight) those are.
        mesh: One dimension of a device mesh: the sequence-parallel one for the mean of each clip, or a flattened one
            that also holds the data-parallel ranks for the mean of all elements of a batch. None: this process alone.

    Returns:
        Scalar with the gradient of `local_sum`. Its mean over the ranks is the loss of the whole; 0 where nobody has a
        valid element.
    """
    count = torch.as_tensor(local_count, device=local_sum.device).detach().to(torch.float64, copy=True)
    if mesh is None:
        return local_sum / torch.where(count > 0, count, 1.0).to(local_sum.dtype)
    dist.all_reduce(count, group=mesh.get_group())
    return local_sum * (mesh.size() / torch.where(count > 0, count, 1.0)).to(local_sum.dtype)
