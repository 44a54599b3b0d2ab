"""Recipes for training in NVFP4: how the factors of a layer's three matrix products are rounded.

A linear layer is three matrix products: forward `y = x W^T`, the gradient of its input `dx = dy W`, and that of its
weight `dW = dy^T x`. In NVFP4 all six factors are rounded to 4 bits. What decides whether training survives it:

- Gradients are rounded stochastically: if they were rounded to nearest, small ones would always vanish.
- `dW` sums over tokens, and outliers among them are first spread by a Hadamard transform of both factors.
- Weights have 16 x 16 blocks, so that forward and backward see the same rounded weight.
- The weights that the optimizer updates stay in float32, and everything that is not a linear layer in a block is left
  alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NVFP4Recipe:
    """How a transformer's blocks are trained in NVFP4.

    Args:
        name: The name of the recipe in command-line options and configurations.
        weight_rule: The scale rule of weights, which are rounded to nearest.
        activation_rule: The scale rule of inputs, which are rounded to nearest.
        gradient_rule: The scale rule of gradients, which are rounded stochastically.
        rounds_input_twice: Whether the weight's gradient is computed from the input as it was rounded for the forward
            pass, rounded again along the other axis: less memory (4 bits are kept for the backward pass), more error.
        keep_first, keep_last: How many blocks at either end stay in higher precision.
    """

    name: str
    weight_rule: str
    activation_rule: str
    gradient_rule: str
    rounds_input_twice: bool
    keep_first: int = 0
    keep_last: int = 0

    def chosen_blocks(self, num_blocks: int) -> range:
        """Return the indices of the blocks that compute in NVFP4."""
        return range(self.keep_first, num_blocks - self.keep_last)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # LongLive-2.0, arXiv 2605.18739 and its training code. Four-over-six with stochastic rounding is biased.
        NVFP4Recipe("longlive", "static_6", "mse", "mse", rounds_input_twice=True),
        # NVIDIA's pre-training recipe, arXiv 2509.25149, as TransformerEngine implements it.
        NVFP4Recipe("nvidia", "static_6", "static_6", "static_6", rounds_input_twice=False),
        # The same with gradients that are right on average, and with the ends of the network kept in higher precision.
        NVFP4Recipe(
            "nvfp4_pretrain",
            "static_6",
            "static_6",
            "unbiased",
            rounds_input_twice=False,
            keep_first=1,
            keep_last=1,
        ),
    )
}


def recipe_named(name: str) -> NVFP4Recipe:
    """Return the recipe of that name.

    Raises:
        ValueError: If there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"An NVFP4 recipe is one of {', '.join(RECIPES)}, got {name!r}.")
    return RECIPES[name]
