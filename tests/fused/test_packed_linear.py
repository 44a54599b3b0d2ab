"""A layer whose weight lies in another layout: the same product, and the weight wherever one asks for it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from longlive_diffusers.fused.onednn import has_onednn
from longlive_diffusers.fused.packed_linear import PackedLinear


DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 96)


def inputs(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 48, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (2, 7), (1, 1, 1), (130,)])
def test_it_computes_what_the_layer_does(linear, dtype, shape, bias):
    if not bias:
        linear.bias = None
    linear, x = linear.to(dtype), inputs(dtype, *shape)
    with torch.no_grad():
        found, expected = PackedLinear(linear, rows=7)(x), linear(x)
    assert found.shape == expected.shape and found.dtype == dtype
    assert (found.float() - expected.float()).abs().max() <= ROUNDING[dtype] * expected.abs().max()


def test_the_weight_is_kept_to_the_bit(linear):
    layer = PackedLinear(linear, rows=7)
    assert layer.is_packed and torch.equal(layer.weight, linear.weight)
    stored = layer.state_dict()
    assert {name: value.shape for name, value in stored.items()} == {"bias": (96,), "weight": (96, 48)}
    assert torch.equal(stored["weight"], linear.weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_a_layer_of_its_own(linear, copied):
    layer = PackedLinear(linear, rows=7)
    other = copied(layer)
    layer.keep(torch.zeros(96, 48))
    assert other.is_packed and torch.equal(other.weight, linear.weight)


def test_a_weight_that_is_loaded_is_multiplied(linear):
    layer, other = PackedLinear(linear, rows=7), nn.Linear(48, 96)
    layer.load_state_dict(other.state_dict())
    x = inputs(torch.float32, 3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), other(x))
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(5, 48\) instead of \(96, 48\)"):
        layer.load_state_dict({"weight": torch.zeros(5, 48), "bias": other.bias})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": other.bias})


def test_it_follows_to_other_dtypes_and_devices(linear):
    layer = PackedLinear(linear, rows=7).bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer.is_packed == has_onednn(torch.bfloat16)
    assert torch.equal(layer.weight, linear.weight.bfloat16())
    layer = layer.double()
    assert not layer.is_packed and layer(inputs(torch.float64, 3)).dtype == torch.float64
    assert layer.to("meta").weight.device.type == "meta" and not layer.is_packed


def test_with_gradients_they_reach_the_input(linear):
    x = inputs(torch.float32, 3).requires_grad_()
    PackedLinear(linear, rows=7)(x).square().sum().backward()
    found, x.grad = x.grad, None
    linear(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_under_autocast_it_computes_in_bfloat16(linear):
    x = inputs(torch.float32, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PackedLinear(linear, rows=7)(x), linear(x))
