"""Everything that needs TransformerEngine, which is optional (the extra "te"): its NVFP4 products with stored weights,
and its own layers and recipe for training.

TransformerEngine quantizes in its own way: it is given a stored weight in bfloat16, and supports only the scale rules
"static_6" and four-over-six. A weight that was quantized in another way is therefore rounded twice.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .format import NVFP4Tensor
from .recipes import NVFP4Recipe


_ERRORS = {"mse": "MSE", "mae": "MAE"}  # four-over-six's measures of error, in TransformerEngine's words
# TransformerEngine has NVIDIA's training recipe. It cannot leave room above the largest number ("unbiased"), and it
# refuses to combine four-over-six with the Hadamard transform, as LongLive's recipe does.
EXPRESSIBLE_RECIPES = ("nvidia",)


@functools.cache
def load_te() -> tuple[Any, str | None]:
    """Return `transformer_engine.pytorch` as `(module, None)`, or `(None, why it cannot be used)`. Tried once."""
    try:
        import transformer_engine.common.recipe
        import transformer_engine.pytorch as te
    except Exception as error:  # a GPU library's import fails in many ways: missing, empty, built for another torch
        return None, f"needs TransformerEngine, which does not load ({type(error).__name__}: {error})"
    if "NVFP4BlockScaling" not in vars(transformer_engine.common.recipe):
        return None, f"needs TransformerEngine 2.8 or later, this one ({te.__file__}) has no NVFP4BlockScaling"
    return te, None


# ----------------------------------------------------------------------------------------------------- stored weights
def te_unsupported_reason(scale_rules: set[str], device: torch.device) -> str | None:
    """Return why TransformerEngine cannot multiply weights and inputs of these rules on a device, as the end of a
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
    if scale_rules >= set(_ERRORS):
        return "measures the errors of weights and inputs alike, this layer has mse for the one and mae for the other"
    return None


def inference_recipe(weight_rule: str, activation_rule: str):
    """Return TransformerEngine's recipe that is closest to a layer's rules; no Hadamard transform, no 2D blocks."""
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
    """The product with a stored weight, computed by a TransformerEngine layer that holds it in its own NVFP4."""

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
        # Inside a tuple, the layer is not a submodule: it is neither saved nor moved, but created again when the
        # weight is moved.
        self.layer_and_recipe = (layer.requires_grad_(False), recipe)

    def forward(
        self,
        x: torch.Tensor,
        weight: NVFP4Tensor,
        share_amax: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`[rows, in_features]` -> `[rows, out_features]`. TransformerEngine rounds `x` by the global scale of these
        rows, also where other ranks have others of the same input (`share_amax`)."""
        te, _ = load_te()
        layer, recipe = self.layer_and_recipe
        with te.autocast(enabled=True, recipe=recipe):
            return layer(x.to(torch.bfloat16)).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------- training
def check_te_recipe(recipe: NVFP4Recipe) -> None:
    """Check that TransformerEngine can train with a recipe.

    Raises:
        ValueError: If TransformerEngine is not available, or cannot express the recipe.
    """
    if recipe.name not in EXPRESSIBLE_RECIPES:
        raise ValueError(
            f"TransformerEngine cannot express the recipe '{recipe.name}', only {', '.join(EXPRESSIBLE_RECIPES)}."
        )
    te, reason = load_te()
    if te is None:
        raise ValueError(f"The NVFP4 backend 'te' {reason}.")


class TETrainingLinear(nn.Linear):
    """A linear layer that TransformerEngine computes with this layer's own parameters: the names, the `state_dict` and
    what the optimizer sees are those of `nn.Linear`."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: NVFP4Recipe) -> "TETrainingLinear":
        """Create a layer that shares the parameters of `linear` rather than copying them."""
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
        # Inside a tuple, the layer is not a submodule: else it would be saved, and its parameters counted, twice.
        layer.layer_and_recipe = (inner, recipes.NVFP4BlockScaling())
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        te, _ = load_te()
        inner, recipe = self.layer_and_recipe
        inner.weight = self.weight  # the current one: it may have been moved or sharded meanwhile
        if self.bias is not None:
            inner.bias = self.bias
        with te.autocast(enabled=True, recipe=recipe):
            return inner(x)
