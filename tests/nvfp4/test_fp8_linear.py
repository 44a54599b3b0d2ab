"""Layers in FP8: their error, their dtypes, and an input that several of them share."""

import pytest
import torch
from torch import nn

from longlive_diffusers.fp8.rows import FP8Rows, rows_to_fp8
from longlive_diffusers.nvfp4 import NVFP4Linear
from longlive_diffusers.nvfp4.fp8_linear import FP8Linear, fp8_unsupported_reason
from longlive_diffusers.nvfp4.together import apply_together


def linear_of(in_features: int = 64, out_features: int = 96, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1, 1), ()])
def test_it_computes_what_the_layer_does_to_within_e4m3(shape, dtype, bias):
    linear = linear_of(bias=bias)
    x = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = FP8Linear(linear)(x.to(dtype)), linear(x)
    assert found.shape == expected.shape and found.dtype == dtype
    # Each factor is rounded to 4 bits of significand: half of 2^-3 at most, a third of that on average.
    assert (found - expected).norm() <= 0.05 * expected.norm()
    assert not torch.equal(found.float(), expected)


def test_rows_and_weights_of_all_sizes_keep_their_precision():
    """A scale for each row: a row of tiny numbers is not lost beside a row of huge ones."""
    linear = linear_of()
    linear.weight.data *= torch.logspace(-6, 6, 96)[:, None]
    linear.bias.data.zero_()
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 7)[:, None]
    with torch.no_grad():
        found, expected = FP8Linear(linear)(x), linear(x)
    ratio = (found - expected).abs() / (x.norm(dim=1)[:, None] * linear.weight.norm(dim=1))
    assert ratio.max() <= 0.05


def test_it_keeps_its_dtypes_when_the_model_is_converted_and_moved():
    layer = FP8Linear(linear_of()).bfloat16().half().float().to("cpu")
    assert layer.weight_codes.dtype == torch.float8_e4m3fn and layer.weight_scale.dtype == torch.float32
    assert layer.bias.dtype == torch.float32
    assert layer.weight.device.type == "cpu" and (layer.in_features, layer.out_features) == (64, 96)


@pytest.mark.parametrize(("inner", "outer"), [(24, 32), (32, 24), (8, 8)])
def test_sizes_that_tensor_cores_cannot_take_are_refused(inner, outer):
    with pytest.raises(ValueError, match=f"multiples of 16, this layer is {inner} -> {outer}"):
        FP8Linear(linear_of(inner, outer))


def test_a_cpu_is_not_faster_in_fp8():
    assert fp8_unsupported_reason(torch.device("cpu")) == "needs a GPU, this is 'cpu'"


def fp8_layers(count: int, in_nvfp4: bool = True) -> list[nn.Module]:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 48) for _ in range(count)]
    if in_nvfp4:
        return [NVFP4Linear.from_linear(layer, backend="fp8").bfloat16() for layer in layers]
    return [FP8Linear(layer).bfloat16() for layer in layers]


@pytest.mark.parametrize("in_nvfp4", [True, False])
def test_an_input_of_several_fp8_layers_is_quantized_once(monkeypatch, in_nvfp4):
    layers, x, calls = fp8_layers(3, in_nvfp4), torch.randn(2, 5, 32).bfloat16(), []

    def counted(rows):
        calls.append(rows.shape)
        return rows_to_fp8(rows)

    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        monkeypatch.setattr("longlive_diffusers.fp8.rows.rows_to_fp8", counted)
        found = apply_together(layers, x)
        rows = FP8Rows.of(x)
        again = apply_together(layers, rows)
    assert all(torch.equal(*outputs) for own in (found, again) for outputs in zip(own, expected, strict=True))
    assert calls == [(10, 32), (10, 32)]  # once for each input; nothing for one that was quantized before
    assert (rows.shape, rows.dtype, rows.codes.shape, rows.scale.shape) == (x.shape, x.dtype, (10, 32), (10, 1))


def test_the_bias_of_an_fp8_product_is_added_before_it_is_rounded():
    (layer,), x = fp8_layers(1), torch.randn(7, 32).bfloat16()
    layer.bias.data.fill_(100.0)
    with torch.no_grad():
        found = layer(x)
        without = layer.float()(x.float()) - 100  # in float32, the product is rounded to bfloat16 before
    assert (found.double() - without.double() - 100).abs().max() <= 0.25 + 2**-6  # half of what bfloat16 has there


@pytest.mark.parametrize("other", ["plain", "hooked", "emulated", "float32"])
def test_layers_that_are_not_all_in_fp8_are_called(other):
    layers, x = fp8_layers(2), torch.randn(5, 32).bfloat16()
    if other == "plain":
        layers[1] = nn.Linear(32, 48).bfloat16()
    elif other == "hooked":
        layers[1].register_forward_hook(lambda layer, args, output: 2 * output)
    elif other == "emulated":
        layers[1].set_backend("emulate")
    else:
        layers, x = [layer.float() for layer in layers], x.float()
    with torch.no_grad():
        assert all(torch.equal(own, layer(x)) for own, layer in zip(apply_together(layers, x), layers, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)], ids=str)
def test_single_rows_and_none_are_multiplied_like_by_a_plain_layer(shape):
    layers = [FP8Linear(linear_of()), NVFP4Linear.from_linear(linear_of(), backend="fp8")]
    for layer in layers:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(*shape, 64, dtype=dtype)
            assert layer(x).shape == (*shape, 96) and layer(x).dtype == dtype
            assert layer.multiply_fp8(FP8Rows.of(x)).shape == (*shape, 96)
