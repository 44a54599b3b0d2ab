"""A product that ends in GELU: the same numbers, and nothing that is around its layer is left out."""

import pytest
import torch
from diffusers.models.activations import GELU
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from longlive_diffusers.fused.feed_forward import FusedGELU
from tests.support.checks import needs_gpu


@pytest.fixture
def layer() -> GELU:
    torch.manual_seed(0)
    return GELU(48, 96, approximate="tanh")


def inputs(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, 48, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("shape", [(5,), (2, 7), (1, 1, 1), ()])
def test_it_computes_what_the_two_do(layer, dtype, rounding, shape):
    x, layer = inputs(dtype, *shape), layer.to(dtype)
    with torch.no_grad():
        found, expected = FusedGELU.sharing(layer)(x), layer(x)
    assert found.shape == expected.shape and found.dtype == dtype
    exact = layer.double()(x.double())
    assert (found - exact).abs().max() <= rounding * exact.abs().max()


def test_parameters_are_shared_under_their_names(layer):
    fused = FusedGELU.sharing(layer)
    assert {name: own.data_ptr() for name, own in fused.named_parameters()} == {
        name: own.data_ptr() for name, own in layer.named_parameters()
    }
    assert fused.training == layer.training and isinstance(fused, GELU)


def test_with_gradients_they_are_those_of_the_two(layer):
    gradients = []
    for own in (layer, FusedGELU.sharing(layer)):
        x = inputs(torch.float32, 3).requires_grad_()
        own(x).square().sum().backward()
        gradients.append((x.grad, layer.proj.weight.grad))
        layer.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def doubled(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def hooked(layer: GELU) -> None:
    layer.proj.register_forward_hook(doubled)


def hooked_before(layer: GELU) -> None:
    layer.proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def replaced(layer: GELU) -> None:
    plain = layer.proj.forward
    layer.proj.forward = lambda x: 2 * plain(x)


def parametrized(layer: GELU) -> None:
    weight_norm(layer.proj)


def of_another_class(layer: GELU) -> None:
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.proj.__class__ = Doubling


@pytest.mark.parametrize("change", [hooked, hooked_before, replaced, parametrized, of_another_class])
def test_what_is_around_the_linear_layer_counts(layer, change):
    change(layer)
    x = inputs(torch.float32, 3)
    with torch.no_grad():
        assert torch.equal(FusedGELU.sharing(layer)(x), layer(x))


def test_under_autocast_it_computes_in_bfloat16(layer):
    x = inputs(torch.float32, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(FusedGELU.sharing(layer)(x), layer(x))


@needs_gpu
@torch.no_grad()
def test_under_autocast_it_computes_in_bfloat16_on_a_gpu(layer):
    layer, x = layer.to("cuda"), inputs(torch.float32, 5).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found, expected = FusedGELU.sharing(layer)(x), layer(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
