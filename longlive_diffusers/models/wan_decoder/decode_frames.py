"""The decoder's blocks, in their order."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanDecoder3d,
    WanResidualBlock,
    WanResidualUpBlock,
    WanUpBlock,
)
from torch import nn

from ...parallel.columns import ColumnSplit
from .cached_convolutions import upsampler_of
from .convolve import convolve, pointwise
from .history import History
from .norm_silu import rms_norm
from .pending_sum import PendingSum
from .upsample import add_repeated, upsample


Tensor = torch.Tensor


def decode_frames(
    decoder: WanDecoder3d, latents: Tensor, kept: list[Tensor], first: bool, split: ColumnSplit | None = None
) -> tuple[Tensor, list[Tensor]]:
    """
    Compute what calling the decoder gives for these latent frames one by one.

    Args:
        decoder: Has the parameters.
        latents: The next latent frames `[B, z_dim, T, h, w]`, after `post_quant_conv`.
        kept: What the convolutions keep of the frames before, as [`History`] takes it; emptied.
        first: Whether this is the first latent frame of a video; it has to come alone.
        split: Who has which columns, where latents and kept frames are a part of the picture, and other ranks call
            this with the others. By default they are all of it.

    Returns:
        The output `[B, out_channels, frames, H, W]`, and what the convolutions keep of these frames.
    """
    history = History(kept)
    # No other name holds features, which are large: they are freed as soon as the next ones are there.
    features = convolve(decoder.conv_in, history.put_before(latents.movedim(1, -1)), split)
    middle: Any = decoder.mid_block  # lists of modules do not say of which
    features = _residual(middle.resnets[0], features, history, split)
    for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attention is not None:
            features = _attend(attention, features.add_up(), split)
        features = _residual(block, features, history, split)
    up_blocks: Any = decoder.up_blocks
    for block in up_blocks:
        repeated = features if _repeats_input(block) else None
        for residual in block.resnets:
            features = _residual(residual, features, history, split)
        if (upsampler := upsampler_of(block)) is not None:
            features = upsample(upsampler, features.add_up(), history, first, split)
        if repeated is not None:
            features = add_repeated(features, block.avg_shortcut, repeated.add_up(), first)
    features = history.put_before_normalized(features, decoder.norm_out.gamma)
    return convolve(decoder.conv_out, features, split).add_up().movedim(-1, 1), history.after


def _repeats_input(block: WanUpBlock | WanResidualUpBlock) -> bool:
    """Whether what a block got is added to what it made of it."""
    return isinstance(block, WanResidualUpBlock) and block.avg_shortcut is not None


def _residual(
    block: WanResidualBlock, features: PendingSum, history: History, split: ColumnSplit | None
) -> PendingSum:
    update = history.put_before_normalized(features, block.norm1.gamma, adds_up=True)
    update = convolve(block.conv1, update, split)
    update = history.put_before_normalized(update, block.norm2.gamma)
    update = convolve(block.conv2, update, split)
    frames, shortcut = features.add_up(), block.conv_shortcut
    return update.plus(frames if isinstance(shortcut, nn.Identity) else pointwise(shortcut, frames))


def _attend(block: WanAttentionBlock, frames: Tensor, split: ColumnSplit | None) -> PendingSum:
    """Attention of each frame's pixels to one another, with a single head."""
    normalized = rms_norm(frames, block.norm.gamma).to(frames.dtype)
    pixels = pointwise(block.to_qkv, normalized).flatten(2, 3).flatten(0, 1).unsqueeze(1)
    query, key, value = pixels.chunk(3, dim=-1)
    if split is not None:  # in whatever order: nothing tells pixels apart but what they hold
        key, value = split.gather(torch.stack([key, value]), axis=-2).unbind()
    attended = F.scaled_dot_product_attention(query, key, value)
    return PendingSum(pointwise(block.proj, attended.reshape(frames.shape))).plus(frames)
