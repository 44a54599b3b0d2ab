"""TransformerEngine's NVFP4 linear layers, for those who have it (the extra "te").

It quantises in its own way: the weight is given to it in bfloat16, and of the scale rules it has "static_6" and
four-over-six. What it makes of a weight that was quantised by another rule is quantised twice.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .linear import NVFP4Linear

_ERRORS = {"mse": "MSE", "mae": "MAE"}  # of four-over-six, in its words


@functools.cache
def load_te() -> tuple[Any, str | None]:
    """`transformer_engine.pytorch` and its recipes, as `(module, None)`, or `(None, why not)`. Tried once."""
    try:
        import transformer_engine.common.recipe
        import transformer_engine.pytorch as te
    except Exception as error:  # a GPU library's import fails in many ways: missing, empty, of another torch
        return None, f"needs TransformerEngine, which does not load ({type(error).__name__}: {error})"
    if "NVFP4BlockScaling" not in vars(transformer_engine.common.recipe):
        return None, f"needs TransformerEngine 2.8 or later, this one ({te.__file__}) has no NVFP4BlockScaling"
    return te, None


def why_no_te(linear: "NVFP4Linear", device: torch.device) -> str | None:
    """What keeps TransformerEngine from serving a layer on a device, as the end of a sentence."""
    te, reason = load_te()
    if te is None:
        return reason
    if device.type != "cuda":
        return f"runs on CUDA, this is '{device.type}'"
    available, reason = te.is_nvfp4_available(return_reason=True)
    if not available:
        return f"cannot run NVFP4 here: {reason}"
    rules = {linear.weight_scale_rule, linear.activation_scale_rule}
    if not rules <= {"static_6", *_ERRORS}:
        return f"knows the rules static_6, mse and mae, this layer has {', '.join(sorted(rules))}"
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


def prepare_te(linear: "NVFP4Linear") -> dict[str, Any]:
    """A layer of TransformerEngine that holds the weight in its own NVFP4, and the recipe it runs under."""
    te, _ = load_te()
    recipe = inference_recipe(linear.weight_scale_rule, linear.activation_scale_rule)
    with te.quantized_model_init(enabled=True, recipe=recipe):
        layer = te.Linear(
            linear.in_features,
            linear.out_features,
            bias=False,
            params_dtype=torch.bfloat16,
            device=linear.weight_codes.device,
        )
    with torch.no_grad():
        layer.weight.copy_(linear.dequantize(torch.bfloat16))
    return {"te_layer": layer.requires_grad_(False), "te_recipe": recipe}


def multiply_in_te(linear: "NVFP4Linear", x: torch.Tensor) -> torch.Tensor:
    te, _ = load_te()
    with te.autocast(enabled=True, recipe=linear.te_recipe):
        return linear.te_layer(x.to(torch.bfloat16)).to(x.dtype)
