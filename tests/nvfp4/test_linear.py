"""NVFP4Linear: its backends, what it keeps, gradients, and the errors of wrong buffers."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from longlive_diffusers.nvfp4 import NVFP4Linear, quantize
from longlive_diffusers.nvfp4.backends import BACKENDS, LayerShape, choose_backend
from longlive_diffusers.nvfp4.linear import weights_of
from longlive_diffusers.nvfp4.matmul import nvfp4_matmul


RUNS_HERE = ("emulate", "w4a16", "fp8")


def plain_linear(in_features: int = 256, out_features: int = 128, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias)
    nn.init.normal_(linear.weight, std=0.02)
    return linear.requires_grad_(False)


def inputs(rows: int = 64, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize(
    ("backend", "rule", "gate"),
    [
        ("emulate", "mse", 0.130),
        ("emulate", "static_6", 0.142),
        ("w4a16", "mse", 0.092),
        ("w4a16", "static_6", 0.099),
        ("fp8", "mse", 0.100),
    ],
)
def test_accuracy(backend, rule, gate):
    linear = plain_linear(bias=False)
    layer = NVFP4Linear.from_linear(linear, weight_scale_rule=rule, activation_scale_rule=rule, backend=backend)
    assert 0.07 < relative(layer(inputs()), linear(inputs())) < gate


@pytest.mark.parametrize("backend", RUNS_HERE)
def test_any_leading_dimensions_and_dtypes(backend):
    layer = NVFP4Linear.from_linear(plain_linear(), backend=backend)
    x = inputs(24)
    flat = layer(x)
    assert flat.dtype == torch.float32 and flat.shape == (24, 128)
    assert torch.equal(layer(x.reshape(2, 3, 4, 256)), flat.reshape(2, 3, 4, 128))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert relative(half(x.bfloat16()), flat) < 0.06
    assert layer(x[:0]).shape == (0, 128)


def test_emulation_is_the_product_of_what_the_codes_stand_for():
    layer = NVFP4Linear.from_linear(plain_linear(bias=False), backend="emulate")
    x = inputs()
    expected = quantize(x).dequantize(torch.float32).double() @ layer.dequantize(torch.float32).double().T
    assert relative(layer(x), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_is_stored_keeps_its_dtypes(dtype):
    layer = NVFP4Linear.from_linear(plain_linear())
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    for name, tensor in stored.items():
        after = layer.get_buffer(name)
        assert after.dtype == tensor.dtype
        assert torch.equal(after.view(torch.uint8), tensor.view(torch.uint8))
    assert layer.to("meta").weight_scales.dtype == torch.float8_e4m3fn


def test_the_state_dict_is_what_is_stored_and_loads_again():
    layer = NVFP4Linear.from_linear(plain_linear(), backend="fp8")
    state = layer.state_dict()
    assert sorted(state) == ["bias", "weight_amax", "weight_codes", "weight_scales"]
    other = NVFP4Linear(256, 128, backend="fp8")
    other.load_state_dict({**state, "weight_amax": state["weight_amax"].squeeze()})  # as some write it
    assert torch.equal(other(inputs()), layer(inputs()))
    with pytest.raises(RuntimeError, match="weight_scales"):
        other.load_state_dict({name: tensor for name, tensor in state.items() if name != "weight_scales"})


def test_gradients_flow_to_the_input_as_through_the_stored_weight():
    for backend in RUNS_HERE:
        layer = NVFP4Linear.from_linear(plain_linear(), backend=backend)
        x = inputs().requires_grad_()
        gradient = torch.randn(64, 128)
        layer(x).backward(gradient)
        torch.testing.assert_close(x.grad, gradient @ layer.dequantize(torch.float32))


@pytest.mark.parametrize("backend", RUNS_HERE)
def test_a_compiled_layer_passes_the_same_gradient_on(backend):
    layer = NVFP4Linear.from_linear(plain_linear(), backend=backend)
    gradients = []
    for network in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = inputs().requires_grad_()
        network(x).square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_it_is_a_linear_layer_that_says_how_it_computes():
    layer = NVFP4Linear.from_linear(plain_linear(), activation_scale_rule="static_6", backend="w4a16")
    assert isinstance(layer, nn.Linear)
    assert "weight=mse, activation=static_6, backend=w4a16" in repr(layer)
    assert "not selected yet" in repr(NVFP4Linear(16, 16, device="meta"))
    assert layer.weight.data_ptr() == layer.weight_codes.data_ptr()


def test_a_wish_that_cannot_be_met_is_told():
    with pytest.warns(UserWarning, match=r"'scaled_mm' needs a GPU of compute capability 10\.0 .*'cpu'; 'emulate'"):
        layer = NVFP4Linear.from_linear(plain_linear(), backend="scaled_mm")
    assert layer.backend.name == "emulate" and layer.requested_backend == "scaled_mm"
    with pytest.warns(UserWarning, match="'te' .*; 'emulate' is used"):
        layer.set_backend("te")
    with pytest.raises(ValueError, match="scaled_mm, te, fp8, w4a16, emulate; got 'fp4'"):
        layer.set_backend("fp4")


@pytest.mark.parametrize(
    ("capability", "sizes", "expected"),
    [
        ((10, 0), (64, 32), "scaled_mm"),
        ((12, 0), (64, 32), "scaled_mm"),
        ((10, 0), (48, 32), "w4a16"),
        ((9, 0), (64, 32), "w4a16"),
        ((8, 9), (64, 32), "w4a16"),
        ((8, 0), (64, 32), "w4a16"),
    ],
)
def test_what_auto_takes_on_gpus(monkeypatch, capability, sizes, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    backend, unmet = choose_backend("auto", LayerShape(*sizes, "mse", "mse"), torch.device("cuda"))
    assert (backend.name, unmet) == (expected, None)


def test_fp8_is_taken_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    layer, gpu = LayerShape(64, 32, "mse", "mse"), torch.device("cuda")
    assert choose_backend("fp8", layer, gpu) == (BACKENDS["fp8"], None)
    narrow = LayerShape(64, 24, "mse", "mse")
    backend, unmet = choose_backend("fp8", narrow, gpu)
    assert backend.name == "w4a16" and "64 -> 24" in unmet


def test_backends_that_do_not_suit_a_layer_say_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    layer = LayerShape(48, 32, "mse", "mse")
    assert "48 -> 32" in BACKENDS["scaled_mm"].unsupported_reason(layer, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "8.9, this one has 8.0" in BACKENDS["fp8"].unsupported_reason(layer, torch.device("cuda"))


def test_the_hardware_product_is_called_as_torch_wants_it():
    """Shapes, strides and dtypes are checked by torch itself, on tensors that pretend to be on a GPU."""
    with FakeTensorMode():
        device = "cuda"
        codes, other = (torch.empty(n, 32, dtype=torch.uint8, device=device) for n in (40, 32))
        scales = [torch.empty(128 * 4, dtype=torch.float8_e4m3fn, device=device) for _ in range(2)]
        one = torch.ones(1, device=device)
        direct = nvfp4_matmul._init_fn(codes, scales[0], one, other, scales[1], one)
        assert direct.shape == (40, 32) and direct.dtype == torch.bfloat16
        fake = nvfp4_matmul(codes, scales[0], one, other, scales[1], one)
        assert (fake.shape, fake.dtype, fake.device) == (direct.shape, direct.dtype, direct.device)


def test_weights_by_name():
    model = nn.Sequential(NVFP4Linear.from_linear(plain_linear()), nn.Linear(128, 4))
    weights = weights_of(model)
    assert weights["0.weight"].shape == (128, 256)
    assert sorted(weights) == ["0.bias", "0.weight", "1.bias", "1.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 24}, "multiples of 16, this layer has 24"),
        ({"weight_scale_rule": "best"}, "'best'"),
        ({"activation_scale_rule": "best"}, "'best'"),
        ({"backend": "best"}, "'best'"),
    ],
)
def test_bad_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        NVFP4Linear(**{"in_features": 32, "out_features": 16, **arguments})


def test_a_weight_of_another_layer_is_refused():
    layer = NVFP4Linear(32, 16)
    with pytest.raises(ValueError, match=r"16 x 32 by 'mse', got \(16, 48\) by 'mse'"):
        layer.store(quantize(torch.randn(16, 48)))
    with pytest.raises(ValueError, match="by 'static_6'"):
        layer.store(quantize(torch.randn(16, 32), "static_6"))


def test_compiled_in_one_graph():
    layer = NVFP4Linear.from_linear(plain_linear(), backend="emulate")
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(inputs()), layer(inputs()))
