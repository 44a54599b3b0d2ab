"""Muon on a CPU: PyTorch's rule, in float32."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from run.muon import Muon


class Dtypes(TorchDispatchMode):
    """In this context, `seen` gathers the dtypes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {result.dtype} if isinstance(result, torch.Tensor) else set()
        return result


def two_steps(optimizer_class: type[torch.optim.Muon], start: nn.Linear) -> tuple[nn.Linear, dict]:
    model = copy.deepcopy(start)
    optimizer = optimizer_class([model.weight], lr=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        model.weight.grad = torch.randn(model.weight.shape, generator=generator)
        optimizer.step()
    return model, optimizer.state_dict()


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (16, 16)])
def test_it_is_pytorchs_in_other_roundings(shape):
    start = nn.Linear(*shape, bias=False)
    (ours, state), (theirs, expected) = (two_steps(kind, start) for kind in (Muon, torch.optim.Muon))
    moved, expected_move = ours.weight - start.weight, theirs.weight - start.weight
    assert (moved - expected_move).norm() < 0.02 * expected_move.norm()
    assert state["param_groups"] == expected["param_groups"]
    assert torch.equal(state["state"][0]["momentum_buffer"], expected["state"][0]["momentum_buffer"])


def test_nothing_is_computed_in_bfloat16():
    model = nn.Linear(8, 4, bias=False)
    model.weight.grad = torch.ones(4, 8)
    gradient, optimizer = model.weight.grad.clone(), Muon([model.weight])
    with Dtypes() as dtypes:
        optimizer.step()
    assert dtypes.seen == {torch.float32}
    assert torch.equal(model.weight.grad, gradient), "what was converted is a copy"


def test_a_closure_is_called():
    model = nn.Linear(8, 4, bias=False)

    def closure() -> torch.Tensor:
        model.weight.grad = torch.ones(4, 8)
        return torch.tensor(3.0)

    assert Muon([model.weight]).step(closure) == 3
