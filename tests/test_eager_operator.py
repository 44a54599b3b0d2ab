"""Operators that are called by themselves where nothing has to see them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from longlive_diffusers.eager_operator import eager_operator


@eager_operator("longlive_tests::doubled")
def doubled(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    """Twice x."""
    return x * by


@doubled.register_fake
def _(x, by=2.0) -> torch.Tensor:
    return torch.empty_like(x)


@eager_operator("longlive_tests::written_by_numpy")
def written_by_numpy(x: torch.Tensor) -> torch.Tensor:
    """x + 1, by what no tracer sees."""
    return torch.from_numpy(x.numpy() + 1)


@eager_operator("longlive_tests::filled", mutates_args=("x",))
def filled(x: torch.Tensor, by: float) -> None:
    """Write to x, by what autograd does not see."""
    x.numpy()[:] = by


class Seen(TorchDispatchMode):
    """Which operators are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_looks_at_operators_sees_it(monkeypatch):
    x = torch.ones(3)
    with Seen() as seen:
        assert torch.equal(doubled(x), 2 * x)
    assert "longlive_tests::doubled" in seen.names
    monkeypatch.setattr(doubled, "registered", None)  # and nothing else calls it
    assert torch.equal(doubled(x, by=3.0), 3 * x)


def test_with_gradients_it_is_the_operator_which_has_none():
    x = torch.ones(3, requires_grad=True)
    assert doubled(x).grad_fn is not None and "longlive_tests" in doubled(x).grad_fn.name()


@torch.no_grad()
def test_fake_tensors_are_not_computed_outside_their_mode_either():
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.ones(3))
    assert isinstance(doubled(x), FakeTensor) and doubled(x).shape == (3,)


@torch.no_grad()
def test_a_trace_holds_it():
    traced = torch.jit.trace(lambda x: written_by_numpy(x), torch.ones(3))
    assert torch.equal(traced(torch.full((3,), 5.0)), torch.full((3,), 6.0))


def test_what_is_written_is_known_to_have_changed():
    weight, x = torch.ones(3, requires_grad=True), torch.ones(3)
    product = (weight * x).sum()  # its backward needs x as it is
    with torch.no_grad():
        filled(x, 7.0)
    assert (x == 7).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        y = torch.ones(3)
        filled(y, by=2.0)
        assert (y == 2).all()


@torch.no_grad()
def test_it_compiles_in_one_graph():
    x = torch.arange(3.0)
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(lambda x: doubled(x + 1), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), 2 * (x + 1))
    assert any("doubled" in target for target in graphs[0])


def test_it_says_what_it_does():
    assert doubled.__doc__ == "Twice x." and doubled.__name__ == "doubled"
