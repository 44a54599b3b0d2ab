"""Training with all three products of a linear layer in NVFP4; see `recipes.py` for what is rounded how."""

import torch
from torch import nn
from torch.nn import functional as F

from .format import BLOCK, NVFP4Tensor, quantize_unchecked
from .matmul import connected_to, multiply
from .recipes import NVFP4Recipe
from .transformer_engine import TETrainingLinear, check_te_recipe


class NVFP4TrainingLinear(nn.Linear):
    """
    A linear layer that computes in NVFP4 and keeps its weight unquantized: the master weight, which the optimizer
    updates and `state_dict` holds, under the names of `nn.Linear`.

    Args:
        in_features, out_features, bias: As in `nn.Linear`; the sizes are multiples of 16.
        recipe: How the layer computes.

    Raises:
        ValueError: If a size is not a multiple of 16.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, recipe: NVFP4Recipe):
        check_sizes(in_features, out_features)
        super().__init__(in_features, out_features, bias, device="meta")
        self.recipe = recipe

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: NVFP4Recipe) -> "NVFP4TrainingLinear":
        """Create a layer that shares the parameters of `linear` rather than copying them."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, recipe)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of `x` or, under autocast, in autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        if len(rows):
            product = _NVFP4Product.apply(rows, self.weight, self.recipe)
        else:  # there is no largest number to scale by
            product = F.linear(rows, self.weight.to(rows.dtype))
        product = product.reshape(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"


class _NVFP4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, recipe: NVFP4Recipe) -> torch.Tensor:
        x_rounded = quantize_unchecked(x, recipe.activation_rule)
        weight_rounded = quantize_unchecked(weight, recipe.weight_rule, (BLOCK, BLOCK))
        ctx.save_for_backward(*_parts(weight_rounded), *(_parts(x_rounded) if recipe.rounds_input_twice else (x,)))
        ctx.recipe, ctx.dtype, ctx.weight_dtype = recipe, x.dtype, weight.dtype
        return connected_to(x, multiply(x_rounded, weight_rounded, x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        recipe = ctx.recipe
        saved = ctx.saved_tensors  # read once: gradient checkpointing does not allow a second time
        codes, scales, amax, *kept = saved
        input_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            gradient_rounded = quantize_unchecked(gradient, recipe.gradient_rule, rounding="stochastic")
            transposed = NVFP4Tensor(codes, scales, amax, recipe.weight_rule, (BLOCK, BLOCK)).transpose()
            input_gradient = multiply(gradient_rounded, transposed, ctx.dtype)
        if ctx.needs_input_grad[1]:
            if recipe.rounds_input_twice:
                codes, scales, amax = kept
                x = NVFP4Tensor(codes, scales, amax, recipe.activation_rule).dequantize(ctx.dtype)
            else:
                (x,) = kept
            # Both are transposed, so that blocks lie along the tokens, which this product sums over.
            gradient_rounded = quantize_unchecked(
                over_tokens(gradient), recipe.gradient_rule, rounding="stochastic", hadamard=True
            )
            x_rounded = quantize_unchecked(over_tokens(x), recipe.activation_rule, hadamard=True)
            weight_gradient = multiply(gradient_rounded, x_rounded, ctx.dtype).to(ctx.weight_dtype)
        return input_gradient, weight_gradient, None


def _parts(tensor: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tensor.codes, tensor.scales, tensor.amax


def over_tokens(states: torch.Tensor) -> torch.Tensor:
    """`[tokens, n]` -> `[n, tokens]`, with the tokens padded with zeros to whole blocks."""
    return F.pad(states, (0, 0, 0, -states.shape[0] % (2 * BLOCK))).T  # 2 * 16, for the hardware


def check_sizes(in_features: int, out_features: int) -> None:
    """Raise a ValueError unless a layer of these sizes can be trained in NVFP4."""
    if in_features % BLOCK or out_features % BLOCK:
        raise ValueError(
            f"Training in NVFP4 needs sizes in multiples of {BLOCK}, this layer is {in_features} -> {out_features}."
        )


def train_in_nvfp4(model: nn.Module, recipe: NVFP4Recipe, backend: str = "auto") -> list[str]:
    """
    Replace the linear layers of a transformer's blocks, in place; the parameters stay the same objects.

    Args:
        model: A model with a list of modules `blocks`, like LongLive's and Wan's transformers.
        recipe: How the layers compute, and which blocks stay as they are.
        backend: "auto" (tensor cores where they support NVFP4, else emulation) or "te" (TransformerEngine).

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: If no block is left to train in NVFP4, a layer's sizes are not multiples of 16, or
            TransformerEngine is requested but not available or not able to express the recipe.
    """
    blocks = list(model.get_submodule("blocks").children())
    layers = {
        f"blocks.{index}.{name}": module
        for index in recipe.chosen_blocks(len(blocks))
        for name, module in blocks[index].named_modules()
        if type(module) is nn.Linear
    }
    if not layers:
        raise ValueError(
            f"Nothing to train in NVFP4: of {len(blocks)} blocks, the recipe '{recipe.name}' keeps the first "
            f"{recipe.keep_first} and the last {recipe.keep_last}."
        )
    for linear in layers.values():
        check_sizes(linear.in_features, linear.out_features)
    if backend == "te":
        check_te_recipe(recipe)
    layer_class = TETrainingLinear if backend == "te" else NVFP4TrainingLinear
    for name, linear in layers.items():
        model.set_submodule(name, layer_class.from_linear(linear, recipe))
    return list(layers)
