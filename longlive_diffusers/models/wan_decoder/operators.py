"""The Triton kernels as operators of torch, which exist without Triton: that is imported when one is first run."""

import torch

from ...triton_launch import launch_from, next_power_of_two, uses_kernels
from .cached_convolutions import KEPT


KERNELS = f"{__package__}.kernels"
TILE = 4096  # numbers that a program computes


def runs_kernels(frames: torch.Tensor) -> bool:
    """Whether these operators compute something for features like these. A compiler makes such kernels itself."""
    return not torch.compiler.is_compiling() and frames.dtype != torch.float64 and uses_kernels(frames)


@torch.library.custom_op("longlive_diffusers::wan_norm_silu_after", mutates_args=())
def norm_silu_after(
    kept: torch.Tensor,
    frames: torch.Tensor,
    gamma: torch.Tensor,
    bias: torch.Tensor | None,
    shortcut: torch.Tensor | None,
    returns_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Compute what `norm_silu.norm_silu_after` says, which has no other bounds than those of float32's last bits.

    Args:
        kept, frames, gamma: As there.
        bias, shortcut: What is added to the frames first, `[C]` and `[B, T, H, W, C]`.
        returns_sum: Whether the sum is needed.

    Returns:
        Both results, and the sum in the dtype of `frames`, or nothing, `[0]`.
    """
    kept, frames, gamma = kept.contiguous(), frames.contiguous(), gamma.contiguous()
    batch, count, height, width, channels = frames.shape
    joined, kept_after, total = _results(frames, returns_sum)
    constants = tile(channels)
    launch_from(
        KERNELS, "norm_silu_after_kernel", _grid(height * width, KEPT + count, batch, constants), frames,
        kept, frames, gamma, _contiguous(bias), _contiguous(shortcut), joined, kept_after,
        total if returns_sum else None, height * width, count, channels**0.5, fuses=True, **constants,
    )  # fmt: skip
    return joined, kept_after, total


@norm_silu_after.register_fake
def _(kept, frames, gamma, bias, shortcut, returns_sum) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _results(frames, returns_sum)


def _results(frames: torch.Tensor, returns_sum: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, count, *shape = frames.shape
    joined, kept_after = (frames.new_empty(batch, KEPT + more, *shape) for more in (count, 0))
    return joined, kept_after, frames.new_empty(frames.shape if returns_sum else 0)


@torch.library.custom_op("longlive_diffusers::wan_add_", mutates_args=("frames",))
def add_(
    frames: torch.Tensor,
    bias: torch.Tensor | None,
    shortcut: torch.Tensor | None,
    factor_t: int = 1,
    factor_s: int = 1,
    repeats: int = 1,
    first: bool = False,
) -> None:
    """
    Add a bias and a shortcut to features, in place; each sum is rounded once.

    Args:
        frames: `[B, T, H, W, C]`, contiguous.
        bias: `[C]`.
        shortcut: `[B, T, H, W, C]`; or what is repeated to that shape as `upsample.add_repeated` says.
        factor_t, factor_s, repeats: The numbers of repetitions, in time, in space and of channels.
        first: Whether `frames` is only the last repetition in time.
    """
    assert frames.is_contiguous()
    batch, count, height, width, channels = frames.shape
    constants = tile(channels)
    launch_from(
        KERNELS, "add_kernel", _grid(height * width, count, batch, constants), frames,
        frames, _contiguous(bias), _contiguous(shortcut), height * width, width, factor_t - 1 if first else 0,
        fuses=True, **constants, TIMES=factor_t, SCALE=factor_s, REPEATS=repeats,
    )  # fmt: skip


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def tile(channels: int) -> dict[str, int]:
    """What a program computes: all channels, filled up to a power of two, of some pixels."""
    wide = next_power_of_two(channels)
    return {"CHANNELS": channels, "WIDE": wide, "PIXELS": max(1, TILE // wide)}


def _grid(pixels: int, frames: int, batch: int, constants: dict[str, int]) -> tuple[int, int, int]:
    return -(-pixels // constants["PIXELS"]), frames, batch
