"""Training in NVFP4 by TransformerEngine's own layers and recipe."""

from typing import Any

import torch
from torch import nn

from .recipes import NVFP4Recipe
from .te_backend import load_te


# It has NVIDIA's recipe. It leaves no room above the largest number ("unbiased"), and it refuses four-over-six
# together with the Hadamard transform, which LongLive's recipe is.
EXPRESSIBLE = ("nvidia",)


def check_te_recipe(recipe: NVFP4Recipe) -> None:
    """
    Raises:
        ValueError: TransformerEngine is not there, or cannot do what the recipe says.
    """
    if recipe.name not in EXPRESSIBLE:
        raise ValueError(
            f"TransformerEngine cannot express the recipe '{recipe.name}', only {', '.join(EXPRESSIBLE)}."
        )
    te, reason = load_te()
    if te is None:
        raise ValueError(f"The NVFP4 backend 'te' {reason}.")


class TETrainingLinear(nn.Linear):
    """A linear layer that TransformerEngine computes, with this layer's own parameters: names, `state_dict` and what
    the optimiser sees are those of `nn.Linear`."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: NVFP4Recipe) -> "TETrainingLinear":
        """With the same parameters, not copies of them."""
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
        # Not a submodule: it would be saved, and its parameters counted, a second time.
        object.__setattr__(layer, "te_layer", inner)
        object.__setattr__(layer, "te_recipe", recipes.NVFP4BlockScaling())
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        te, _ = load_te()
        inner: Any = self.te_layer
        inner.weight = self.weight  # whatever moved or sharded it meanwhile
        if self.bias is not None:
            inner.bias = self.bias
        with te.autocast(enabled=True, recipe=self.te_recipe):
            return inner(x)
