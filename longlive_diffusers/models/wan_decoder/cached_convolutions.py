"""The causal convolutions of a decoder, the size of their inputs, and how many latent frames this allows at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
    WanResidualUpBlock,
    WanUpBlock,
)


KEPT = 2  # the number of earlier frames that a convolution sees
MOST_ELEMENTS = 2**31 - 1  # of a convolution's input: cuDNN counts them in 32 bits


@dataclass(frozen=True)
class CachedConvolution:
    """
    A causal convolution.

    Args:
        module: The module.
        scale: The height and width of its input, in latents.
        frames: The number of frames of its input for each latent frame.
    """

    module: WanCausalConv3d
    scale: int
    frames: int


def upsampler_of(block: WanUpBlock | WanResidualUpBlock) -> WanResample | None:
    """What doubles the resolution at the end of a block, if anything does."""
    if isinstance(block, WanResidualUpBlock):
        return block.upsampler
    upsamplers: Any = block.upsamplers  # a list of modules does not say of which
    return None if upsamplers is None else upsamplers[0]


def cached_convolutions(decoder: WanDecoder3d) -> Iterator[CachedConvolution]:
    """The convolutions that see earlier frames, in the order in which they run. It is also the order of diffusers'
    feature cache."""

    def in_blocks(blocks: Any) -> Iterator[CachedConvolution]:
        block: WanResidualBlock
        for block in blocks:
            yield CachedConvolution(block.conv1, scale, frames)
            yield CachedConvolution(block.conv2, scale, frames)

    scale, frames = 1, 1
    yield CachedConvolution(decoder.conv_in, scale, frames)
    yield from in_blocks(decoder.mid_block.resnets)
    up_blocks: Any = decoder.up_blocks
    for block in up_blocks:
        yield from in_blocks(block.resnets)
        upsampler = upsampler_of(block)
        if upsampler is None:
            continue
        if upsampler.mode == "upsample3d":
            yield CachedConvolution(upsampler.time_conv, scale, frames)
            frames *= 2
        scale *= 2
    yield CachedConvolution(decoder.conv_out, scale, frames)


def frames_at_once(decoder: WanDecoder3d, batch: int, height: int, width: int, most: int) -> int:
    """
    How many latent frames can be decoded in one call; at least one.

    Args:
        decoder: The decoder.
        batch, height, width: The size of the latents.
        most: The most that are wanted: memory grows with them.
    """

    def allowed(convolution: CachedConvolution) -> int:
        frame = batch * height * width * convolution.scale**2 * convolution.module.in_channels
        return (MOST_ELEMENTS // frame - KEPT) // convolution.frames

    return max(1, min(most, *map(allowed, cached_convolutions(decoder))))
