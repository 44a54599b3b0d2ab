"""The feed-forward layers of a block on an input in FP8."""

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import nn

from ..fp8.rows import FP8Rows
from ..fused.feed_forward import FusedGELU, gelu_in_fp8
from ..fused.layers import is_plain, is_undecorated
from ..nvfp4.together import apply_together, take_fp8


def first_layers(layers: FeedForward, device: torch.device) -> tuple[nn.Module, ...]:
    """Return what reads the input of feed-forward layers: their first, if [`feed_forward_in_fp8`] computes what a call
    of them does, and else nothing."""
    if not is_plain(layers, FeedForward, device) or len(layers.net) != 3:
        return ()
    activation, dropout = layers.net[0], layers.net[1]
    if not is_plain(dropout, nn.Dropout, device) or not isinstance(activation, GELU):
        return ()
    return (activation.proj,) if type(activation) in (GELU, FusedGELU) and is_undecorated(activation) else ()


def feed_forward_in_fp8(layers: FeedForward, x: FP8Rows) -> torch.Tensor:
    """Compute feed-forward layers whose input is quantized already, because their [`first_layers`] take it so:
    bfloat16 `[..., dim]`. Where the last one does, too, what it reads is never in memory in bfloat16."""
    activation, dropout, last = layers.net
    assert isinstance(activation, GELU) and isinstance(dropout, nn.Dropout)  # see `first_layers`
    (before,) = apply_together((activation.proj,), x)
    drops = dropout.training and dropout.p > 0
    if drops or activation.approximate != "tanh" or not take_fp8((last,), before):
        return last(dropout(activation.gelu(before)))
    (update,) = apply_together((last,), gelu_in_fp8(before))
    return update
