"""The decoder's blocks, in their order."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanDecoder3d,
    WanResidualBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
)
from torch import nn

from ...parallel.columns import ColumnSplit
from .cached_convolutions import upsampler_of
from .convolve import convolve, pointwise
from .history import History
from .norm_silu import rms_norm
from .upsample import add_repeated, upsample


Tensor = torch.Tensor


def decode_frames(
    decoder: WanDecoder3d, latents: Tensor, kept: Sequence[Tensor], first: bool, split: ColumnSplit | None = None
) -> tuple[Tensor, list[Tensor]]:
    """
    Compute what calling the decoder gives for these latent frames one by one.

    Args:
        decoder: Has the parameters.
        latents: The next latent frames `[B, z_dim, T, h, w]`, after `post_quant_conv`.
        kept: What the convolutions keep of the frames before, as [`History`] takes it.
        first: Whether this is the first latent frame of a video; it has to come alone.
        split: Who has which columns, where latents and kept frames are a part of the picture, and other ranks call
            this with the others. By default they are all of it.

    Returns:
        The output `[B, out_channels, frames, H, W]`, and what the convolutions keep of these frames.
    """
    history = History(kept)
    frames = convolve(decoder.conv_in, history.put_before(latents.movedim(1, -1)), split)
    middle: Any = decoder.mid_block  # lists of modules do not say of which
    frames = _residual(middle.resnets[0], frames, history, split)
    for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attention is not None:
            frames = _attend(attention, frames, split)
        frames = _residual(block, frames, history, split)
    up_blocks: Any = decoder.up_blocks
    for block in up_blocks:
        frames = _up(block, frames, history, first, split)
    frames = _convolve_normalized(decoder.conv_out, decoder.norm_out, frames, history, split)
    return frames.movedim(-1, 1), history.after


def _convolve_normalized(
    module: nn.Conv3d, norm: WanRMS_norm, frames: Tensor, history: History, split: ColumnSplit | None
) -> Tensor:
    return convolve(module, history.put_before_normalized(frames, norm.gamma), split)


def _residual(block: WanResidualBlock, frames: Tensor, history: History, split: ColumnSplit | None) -> Tensor:
    update = _convolve_normalized(block.conv1, block.norm1, frames, history, split)
    update = _convolve_normalized(block.conv2, block.norm2, update, history, split)
    shortcut = block.conv_shortcut
    return update.add_(frames if isinstance(shortcut, nn.Identity) else pointwise(shortcut, frames))


def _attend(block: WanAttentionBlock, frames: Tensor, split: ColumnSplit | None) -> Tensor:
    """Attention of each frame's pixels to one another, with a single head."""
    normalized = rms_norm(frames, block.norm.gamma).to(frames.dtype)
    pixels = pointwise(block.to_qkv, normalized).flatten(2, 3).flatten(0, 1).unsqueeze(1)
    query, key, value = pixels.chunk(3, dim=-1)
    if split is not None:  # in whatever order: nothing tells pixels apart but what they hold
        key, value = split.gather(torch.stack([key, value]), axis=-2).unbind()
    attended = F.scaled_dot_product_attention(query, key, value)
    return pointwise(block.proj, attended.reshape(frames.shape)).add_(frames)


def _up(
    block: WanUpBlock | WanResidualUpBlock, frames: Tensor, history: History, first: bool, split: ColumnSplit | None
) -> Tensor:
    """Residual blocks, and twice the resolution where the block has it."""
    result, blocks = frames, cast(Any, block.resnets)
    for residual in blocks:
        result = _residual(residual, result, history, split)
    upsampler = upsampler_of(block)
    if upsampler is not None:
        result = upsample(upsampler, result, history, first, split)
    if isinstance(block, WanResidualUpBlock) and block.avg_shortcut is not None:
        result = add_repeated(result, block.avg_shortcut, frames, first)
    return result
