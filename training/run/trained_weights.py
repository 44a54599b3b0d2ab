"""The weights of a role of distillation and its optimizer: kept in checkpoints, averaged over processes, and gathered
for the result. Accelerate knows one model and one optimizer under FSDP, and here are two."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor


BUCKET = 2**26  # elements that are reduced together


class TrainedWeights:
    """
    The state of parameters that accelerate does not know of; if FSDP shards them, of this process's part.

    Args:
        parameters: The parameters, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a part of its own."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the weights by name."""
        return {name: local(parameter).detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """
        Restore saved weights.

        Raises:
            ValueError: If they are of another network.
        """
        own = self.state_dict()
        if {name: tensor.shape for name, tensor in own.items()} != {name: state[name].shape for name in state}:
            raise ValueError(f"The checkpoint has {len(state)} trained weights of another network than this one's")
        for name, tensor in own.items():
            tensor.copy_(state[name])


class OptimizerState:
    """
    The state of an optimizer that accelerate does not know of; if FSDP shards its parameters, of this process's part.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, with this process's part of sharded tensors."""
        state = self.optimizer.state_dict()
        by_parameter = {
            index: {name: local(value) if isinstance(value, torch.Tensor) else value for name, value in own.items()}
            for index, own in state["state"].items()
        }
        return {**state, "state": by_parameter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        by_parameter = {
            index: {name: _sharded_like(parameters[index], value) for name, value in own.items()}
            for index, own in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": by_parameter})


def _sharded_like(parameter: nn.Parameter, value: Any) -> Any:
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


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """
    Average gradients over all processes, where FSDP has not done so. Every process has to call this.

    DDP would do it in the backward, but not here: it takes the parameters of one forward for those of every forward,
    whereas only one of two LoRAs is in use at a time, and a roll-out has many forwards.
    """
    if accelerator.num_processes == 1 or accelerator.is_fsdp2:
        return
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.numel()
        if size >= BUCKET:
            _average(accelerator, bucket)
            bucket, size = [], 0
    if bucket:
        _average(accelerator, bucket)


def _average(accelerator: Accelerator, gradients: list[torch.Tensor]) -> None:
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


def gathered(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return complete copies of tensors on the CPU. Every process has to call this: it gathers what FSDP shards."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
        for name, tensor in parameters.items()
    }


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that FSDP has sharded; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
