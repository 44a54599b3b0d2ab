"""States that a checkpoint holds besides what accelerate saves, each as a pair of `state_dict` and `load_state_dict`:
averaged weights, and trained weights and optimizers of which accelerate does not know. (Under FSDP it knows one model
and one optimizer, and distillation has two.)"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor

from run.sharding import local, sharded_like


class EMAState:
    """The state of averaged weights; if FSDP shards them, of this process's part."""

    def __init__(self, ema: EMAModel):
        self.ema = ema

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a part of its own."""
        return any(isinstance(tensor, DTensor) for tensor in self.ema.shadow_params)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the averages."""
        return {
            "optimization_step": self.ema.optimization_step,
            "shadow": [local(tensor) for tensor in self.ema.shadow_params],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.ema.optimization_step = state["optimization_step"]
        for shadow, saved in zip(self.ema.shadow_params, state["shadow"], strict=True):
            local(shadow).copy_(saved)


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
            index: {name: sharded_like(parameters[index], value) for name, value in own.items()}
            for index, own in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": by_parameter})
