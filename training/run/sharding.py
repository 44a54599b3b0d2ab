"""Tensors that FSDP shards: a process's part of one, and all of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that FSDP has sharded; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: nn.Parameter, value: Any) -> Any:
    """Return a part of a sharded tensor as that tensor, if it is one of the shape of a sharded parameter."""
    is_part = isinstance(parameter, DTensor) and isinstance(value, torch.Tensor)
    if not is_part or value.shape != parameter.to_local().shape:
        return value
    return DTensor.from_local(
        value.to(parameter.to_local().device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def gathered(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return complete copies of tensors on the CPU. Every process has to call this: it gathers what FSDP shards."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
        for name, tensor in parameters.items()
    }
