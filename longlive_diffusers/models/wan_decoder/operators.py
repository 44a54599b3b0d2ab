"""The Triton kernel as an operator of torch, which exists without Triton: that is imported when it is first run."""

import torch

from ...triton_launch import launch_from, next_power_of_two
from .cached_convolutions import KEPT


KERNELS = f"{__package__}.kernels"
TILE = 4096  # numbers that a program normalizes


@torch.library.custom_op("longlive_diffusers::wan_norm_silu_after", mutates_args=())
def norm_silu_after(
    kept: torch.Tensor, frames: torch.Tensor, gamma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `norm_silu.norm_silu_after` says, which has no other bounds than those of float32's last bits."""
    kept, frames, gamma = kept.contiguous(), frames.contiguous(), gamma.contiguous()
    batch, count, height, width, channels = frames.shape
    joined = frames.new_empty(batch, KEPT + count, height, width, channels)
    kept_after = torch.empty_like(kept)
    wide = next_power_of_two(channels)
    pixels = max(1, TILE // wide)
    grid = (-(-height * width // pixels), KEPT + count, batch)
    launch_from(
        KERNELS, "norm_silu_after_kernel", grid, frames,
        kept, frames, gamma, joined, kept_after, height * width, count, channels**0.5,
        fuses=True, CHANNELS=channels, WIDE=wide, PIXELS=pixels,
    )  # fmt: skip
    return joined, kept_after


@norm_silu_after.register_fake
def _(kept, frames, gamma) -> tuple[torch.Tensor, torch.Tensor]:
    batch, count, *shape = frames.shape
    return frames.new_empty(batch, KEPT + count, *shape), frames.new_empty(batch, KEPT, *shape)
