"""The feed-forward layers in training: of the two largest activations of a block, before and after GELU, the backward
keeps the first alone, and makes the second again for the gradient of the last layer's weight."""

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward

from ..fp8.rows import FP8Rows
from ..fused.layers import is_plain
from .fp8_feed_forward import feed_forward_in_fp8
from .saved_recipes import in_plain_autograd, saved_as_recipe


def feed_forward(layers: FeedForward, hidden_states: torch.Tensor | FP8Rows) -> torch.Tensor:
    """Call feed-forward layers, `[..., dim]` -> `[..., dim]`; the linear layers within may be of any kind, such as in
    4 bits or with a LoRA. Where one of the modules around them is not what it was made, it is called as it is. The
    input is in FP8 only where `fp8_feed_forward.first_layers` take it so."""
    if isinstance(hidden_states, FP8Rows):
        return feed_forward_in_fp8(layers, hidden_states)
    if not in_plain_autograd() or not is_plain(layers, FeedForward, hidden_states.device):
        return layers(hidden_states)
    activation, dropout, last = layers.net
    if not is_plain(activation, GELU, hidden_states.device):
        return layers(hidden_states)
    before = activation.proj(hidden_states)
    after = activation.gelu(before)
    with saved_as_recipe(after, activation.gelu, before):
        return last(dropout(after))
