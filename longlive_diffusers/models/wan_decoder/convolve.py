"""Convolutions of features `[B, T, H, W, C]`."""

import torch
import torch.nn.functional as F
from torch import nn

from ...fused.onednn import has_onednn
from ...parallel.columns import ColumnSplit
from .beside import put_beside
from .pending_sum import PendingSum, bias_now_and_later


def convolve(module: nn.Conv3d, frames: torch.Tensor, split: ColumnSplit | None) -> PendingSum:
    """
    Convolve, with zeros around every frame, and none before the first or after the last.

    Args:
        module: Has the weights, `[C', C, t, h, w]`; height and width of the kernel are 1 or 3.
        frames: `[B, T, H, W, C]`.
        split: Who has which columns, where others than this rank have some.

    Returns:
        `[B, T - t + 1, H, W, C']`.
    """
    weight, (bias, later) = module.weight, bias_now_and_later(module.bias, frames)
    padding = [0, *(size // 2 for size in weight.shape[-2:])]
    if split is not None and padding[split.axis]:
        frames, padding[split.axis] = put_beside(frames, split), 0
    channels_first = frames.movedim(-1, 1)
    if _is_for_onednn(frames):
        settings = (padding, (1, 1, 1), (1, 1, 1), 1, "none", [], "")  # no stride, dilation, groups or activation
        result = torch.ops.mkldnn._convolution_pointwise(channels_first, weight, bias, *settings)
    else:
        result = F.conv3d(channels_first, weight, bias, padding=padding)
    result = result.movedim(1, -1).contiguous()  # which it is, where there is a kernel for this layout
    return PendingSum(result, later)


def _is_for_onednn(frames: torch.Tensor) -> bool:
    """Whether oneDNN is to be asked for by name: `F.conv3d` has it do 16 bits, but float32 only in large frames, and
    the others by a kernel that is ten times slower (torch 2.13)."""
    return frames.device.type == "cpu" and frames.dtype == torch.float32 and _has_onednn()


@torch.compiler.assume_constant_result  # `torch.compile` does not look into this module of torch's
def _has_onednn() -> bool:
    return has_onednn(torch.float32)


def pointwise(module: nn.Conv2d | nn.Conv3d, frames: torch.Tensor) -> torch.Tensor:
    """Apply a convolution whose kernel is a single pixel."""
    return F.linear(frames, module.weight.flatten(1), module.bias)
