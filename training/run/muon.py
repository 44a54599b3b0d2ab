"""Muon as PyTorch has it, also on CPUs that have no instructions for bfloat16.

It computes its products in bfloat16. A CPU without such instructions takes ten times as long for them as in float32:
of an update of the embedded model, nine tenths.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, which computes in float32 on a CPU. The arguments and the state are the same."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the weights once."""
        on_cpu = all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"])
        with NotInBfloat16() if on_cpu else nullcontext():
            return super().step(closure)


class NotInBfloat16(TorchFunctionMode):
    """In this context, what a tensor is converted to bfloat16 for is computed in the tensor's own dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))
