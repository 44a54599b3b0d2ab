"""Training in NVFP4: the three products, recipes, and what a network makes of them."""

import pytest
import torch
from torch import nn

from longlive_diffusers.nvfp4 import quantize
from longlive_diffusers.nvfp4.recipes import RECIPES, NVFP4Recipe, recipe_named
from longlive_diffusers.nvfp4.training import NVFP4TrainingLinear, over_tokens, train_in_nvfp4
from tests.support.nvfp4_models import small_transformer
from tests.support.tiny_pipeline import random_inputs


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def errors_of(recipe: NVFP4Recipe, size: int = 512) -> tuple[float, float, float]:
    """Relative errors of y, dx and dW, with gradients that have heavy tails."""
    torch.manual_seed(0)
    x = torch.randn(size, size, requires_grad=True)
    linear = nn.Linear(size, size, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    gradient = torch.randn(size, size) * torch.exp(torch.randn(size, size))
    layer = NVFP4TrainingLinear.from_linear(linear, recipe)
    y = layer(x)
    y.backward(gradient)
    weight = linear.weight.detach()
    return (
        relative(y.detach(), x.detach() @ weight.T),
        relative(x.grad, gradient @ weight),
        relative(linear.weight.grad, gradient.T @ x.detach()),
    )


# Measured on these sizes, with room for another draw of noise.
@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("longlive", (0.145, 0.175, 0.180)),
        ("nvidia", (0.150, 0.185, 0.185)),
        ("nvfp4_pretrain", (0.150, 0.215, 0.195)),
    ],
)
def test_errors_of_the_three_products(name, gates):
    errors = errors_of(RECIPES[name])
    assert all(0.1 < error < gate for error, gate in zip(errors, gates, strict=True)), errors


def test_rounding_the_input_twice_costs_accuracy():
    once = errors_of(NVFP4Recipe("once", "static_6", "mse", "mse", rounds_input_twice=False))
    assert once[2] < errors_of(RECIPES["longlive"])[2] - 0.01


def test_forward_is_the_product_of_the_rounded_factors():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(2, 24, 64)
    layer = NVFP4TrainingLinear.from_linear(linear, RECIPES["longlive"])
    expected = quantize(x.flatten(0, 1), "mse").dequantize(torch.float32)
    expected = expected @ quantize(linear.weight.detach(), "static_6", (16, 16)).dequantize(torch.float32).T
    torch.testing.assert_close(layer(x), expected.unflatten(0, (2, 24)) + linear.bias, atol=1e-5, rtol=1e-5)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert "recipe=longlive" in repr(layer)


def test_gradients_are_right_on_average():
    """The mean of many backwards, each with its own noise, tends to the gradient of the rounded factors."""
    torch.manual_seed(0)
    linear, x, gradient = nn.Linear(64, 64, bias=False), torch.randn(64, 64), torch.randn(64, 64) ** 3
    recipe = RECIPES["nvfp4_pretrain"]
    layer = NVFP4TrainingLinear.from_linear(linear, recipe)
    total = torch.zeros(64, 64)
    for _ in range(200):
        inputs = x.clone().requires_grad_()
        layer(inputs).backward(gradient)
        total += inputs.grad
    weight = quantize(linear.weight.detach(), "static_6", (16, 16)).dequantize(torch.float32)
    one = relative(inputs.grad, gradient @ weight)
    assert relative(total / 200, gradient @ weight) < one / 10


def test_noise_is_of_torchs_random_state():
    linear, x = nn.Linear(32, 32), torch.randn(16, 32)
    layer = NVFP4TrainingLinear.from_linear(linear, RECIPES["longlive"])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        linear.weight.grad = None
        layer(x).square().sum().backward()
        found.append(linear.weight.grad.clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("tokens", [1, 16, 31, 100])
def test_any_number_of_tokens(tokens):
    layer = NVFP4TrainingLinear.from_linear(nn.Linear(32, 16), RECIPES["longlive"])
    x = torch.randn(tokens, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.shape == (16, 32)
    assert over_tokens(x.detach()).shape == (32, -(-tokens // 32) * 32)


def test_only_what_is_asked_for_is_computed():
    layer = NVFP4TrainingLinear.from_linear(nn.Linear(32, 16), RECIPES["longlive"])
    layer.requires_grad_(False)
    x = torch.randn(16, 32, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


def test_under_autocast_it_computes_in_its_dtype():
    layer = NVFP4TrainingLinear.from_linear(nn.Linear(32, 16), RECIPES["nvidia"])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(16, 32))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ networks
def test_layers_of_the_blocks_are_replaced_and_names_stay():
    model = small_transformer(num_layers=4)
    names = list(model.state_dict())
    layers = train_in_nvfp4(model, RECIPES["longlive"])
    assert len(layers) == 40
    assert list(model.state_dict()) == names
    model = small_transformer(num_layers=4)
    assert {name.split(".")[1] for name in train_in_nvfp4(model, RECIPES["nvfp4_pretrain"])} == {"1", "2"}
    assert type(model.blocks[0].attn1.to_q) is nn.Linear and type(model.proj_out) is nn.Linear


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_network_learns(checkpointing):
    torch.manual_seed(0)
    model = small_transformer().train()
    train_in_nvfp4(model, RECIPES["longlive"])
    if checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = random_inputs()
    target = torch.randn_like(inputs["hidden_states"])
    losses = []
    for _ in range(10):
        loss = (model(**inputs).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -------------------------------------------------------------------------------------------------------------- errors
def test_bad_wishes():
    with pytest.raises(ValueError, match="longlive, nvidia, nvfp4_pretrain, got 'best'"):
        recipe_named("best")
    with pytest.raises(ValueError, match="of 2 blocks, the recipe 'nvfp4_pretrain' keeps the first 1 and the last 1"):
        train_in_nvfp4(small_transformer(), RECIPES["nvfp4_pretrain"])
    with pytest.raises(ValueError, match="multiples of 16, this layer is 24 -> 24"):
        train_in_nvfp4(small_transformer(attention_head_dim=12), RECIPES["longlive"])
    with pytest.raises(ValueError, match="cannot express the recipe 'longlive', only nvidia"):
        train_in_nvfp4(small_transformer(), RECIPES["longlive"], "te")
    with pytest.raises(ValueError, match="'te' needs TransformerEngine, which does not load"):
        train_in_nvfp4(small_transformer(), RECIPES["nvidia"], "te")


def test_compiled_in_one_graph_with_gradients():
    torch.manual_seed(0)
    layer = NVFP4TrainingLinear.from_linear(nn.Linear(64, 32), RECIPES["longlive"])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(48, 64)
    results = []
    for network in (layer, compiled):
        layer.zero_grad()
        torch.manual_seed(1)  # of the noise
        y = network(x)
        y.square().sum().backward()
        results.append((y.detach(), layer.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_single_rows_and_none_are_multiplied_like_by_a_plain_layer(recipe, shape, dtype):
    linear = nn.Linear(32, 48)
    layer = NVFP4TrainingLinear.from_linear(linear, RECIPES[recipe])
    x = torch.ones(*shape, 32, dtype=dtype, requires_grad=True)
    product = layer(x)
    assert product.shape == (*shape, 48) and product.dtype == dtype
    product.float().sum().backward()
    assert x.grad.shape == x.shape and linear.weight.grad.shape == linear.weight.shape
    assert linear.weight.grad.isfinite().all() and linear.weight.grad.any() == bool(x.numel())
