"""What needs TransformerEngine, for those who have it (the extra "te"): its NVFP4 products of stored weights, and its
own layers and recipe in training.

It quantizes in its own way: a stored weight is given to it in bfloat16, and of the scale rules it has "static_6" and
four-over-six. What it makes of a weight that was quantized by another rule is quantized twice.
"""

import functools
from typing import Any

import torch
from torch import nn

from .format import NVFP4Tensor
from .recipes import NVFP4Recipe


_ERRORS = {"mse": "MSE", "mae": "MAE"}  # of four-over-six, in its words
# It has NVIDIA's training recipe. It leaves no room above the largest number ("unbiased"), and it refuses
# four-over-six together with the Hadamard transform, which LongLive's recipe is.
EXPRESSIBLE_RECIPES = ("nvidia",)


@functools.cache
def load_te() -> tuple[Any, str | None]:
    """`transformer_engine.pytorch` as `(module, None)`, or `(None, why it cannot be used)`. Tried once."""
    try:
        import transformer_engine.common.recipe
        import transformer_engine.pytorch as te
    except Exception as error:  # a GPU library's import fails in many ways: missing, empty, of another torch
        return None, f"needs TransformerEngine, which does not load ({type(error).__name__}: {error})"
    if "NVFP4BlockScaling" not in vars(transformer_engine.common.recipe):
        return None, f"needs TransformerEngine 2.8 or later, this one ({te.__file__}) has no NVFP4BlockScaling"
    return te, None


# ----------------------------------------------------------------------------------------------------- stored weights
def te_unsupported_reason(scale_rules: set[str], device: torch.device) -> str | None:
    """Why TransformerEngine cannot multiply by weights and inputs of these rules on a device, as the end of a
    sentence; None if it can."""
    te, reason = load_te()
    if te is None:
        return reason
    if device.type != "cuda":
        return f"runs on CUDA, this is '{device.type}'"
    available, reason = te.is_nvfp4_available(return_reason=True)
    if not available:
        return f"cannot run NVFP4 here: {reason}"
    if not scale_rules <= {"static_6", *_ERRORS}:
        return f"knows the rules static_6, mse and mae, this layer has {', '.join(sorted(scale_rules))}"
    return None


def inference_recipe(weight_rule: str, activation_rule: str):
    """TransformerEngine's recipe that is nearest to the rules of a layer; no Hadamard transform, no 2D blocks."""
    import transformer_engine.common.recipe as recipes

    which = {
        (False, False): "none",
        (True, False): "weights",
        (False, True): "activations",
        (True, True): "all",
    }[weight_rule in _ERRORS, activation_rule in _ERRORS]
    options = {"disable_rht": True, "disable_stochastic_rounding": True, "disable_2d_quantization": True}
    if which != "none":
        error = _ERRORS[weight_rule if weight_rule in _ERRORS else activation_rule]
        options |= {"nvfp4_4over6": which, "nvfp4_4over6_err_mode": error}
    return recipes.NVFP4BlockScaling(**options)


class TEProduct(nn.Module):
    """The product with a stored weight by a layer of TransformerEngine, which holds the weight in its own NVFP4."""

    def __init__(self, weight: NVFP4Tensor, activation_rule: str):
        super().__init__()
        te, _ = load_te()
        recipe = inference_recipe(weight.scale_rule, activation_rule)
        out_features, in_features = weight.shape
        with te.quantized_model_init(enabled=True, recipe=recipe):
            layer = te.Linear(
                in_features, out_features, bias=False, params_dtype=torch.bfloat16, device=weight.codes.device
            )
        with torch.no_grad():
            layer.weight.copy_(weight.dequantize(torch.bfloat16))
        # In a tuple it is not a submodule: it is neither saved nor moved, but made anew where the weight is moved to.
        self.layer_and_recipe = (layer.requires_grad_(False), recipe)

    def forward(self, x: torch.Tensor, weight: NVFP4Tensor) -> torch.Tensor:
        """`[rows, in_features]` -> `[rows, out_features]`."""
        te, _ = load_te()
        layer, recipe = self.layer_and_recipe
        with te.autocast(enabled=True, recipe=recipe):
            return layer(x.to(torch.bfloat16)).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------- training
def check_te_recipe(recipe: NVFP4Recipe) -> None:
    """
    Raises:
        ValueError: If TransformerEngine is not there, or cannot do what the recipe says.
    """
    if recipe.name not in EXPRESSIBLE_RECIPES:
        raise ValueError(
            f"TransformerEngine cannot express the recipe '{recipe.name}', only {', '.join(EXPRESSIBLE_RECIPES)}."
        )
    te, reason = load_te()
    if te is None:
        raise ValueError(f"The NVFP4 backend 'te' {reason}.")


class TETrainingLinear(nn.Linear):
    """A linear layer that TransformerEngine computes, with this layer's own parameters: names, `state_dict` and what
    the optimizer sees are those of `nn.Linear`."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: NVFP4Recipe) -> "TETrainingLinear":
        """A layer with the same parameters, not copies of them."""
        te, _ = load_te()
        import transformer_engine.common.recipe as recipes

        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        inner = te.Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            params_dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        # In a tuple it is not a submodule: it would be saved, and its parameters counted, a second time.
        layer.layer_and_recipe = (inner, recipes.NVFP4BlockScaling())
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        te, _ = load_te()
        inner, recipe = self.layer_and_recipe
        inner.weight = self.weight  # whatever moved or sharded it meanwhile
        if self.bias is not None:
            inner.bias = self.bias
        with te.autocast(enabled=True, recipe=recipe):
            return inner(x)
