"""Doubling the resolution of features `[B, T, H, W, C]`, in space and time."""

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D, WanResample
from torch import nn

from ...parallel.columns import ColumnSplit
from . import operators
from .beside import put_beside
from .convolve import convolve
from .history import History
from .pending_sum import PendingSum, bias_now_and_later


def upsample(
    module: WanResample, frames: torch.Tensor, history: History, first: bool, split: ColumnSplit | None
) -> PendingSum:
    """
    Double height and width, and for some modules the number of frames.

    Args:
        module: Has the weights.
        frames: `[B, T, H, W, C]`.
        history: Has the frames before.
        first: Whether this is the first frame of a video, which is not doubled.
        split: Who has which columns, where others than this rank have some.
    """
    if module.mode == "upsample3d":
        if first:
            history.pass_by()
        else:
            frames = _double_frames(module.time_conv, frames, history)
    _, convolution = cast(nn.Sequential, module.resample)
    return double_and_convolve(cast(nn.Conv2d, convolution), frames, split)


def _double_frames(module: nn.Conv3d, frames: torch.Tensor, history: History) -> torch.Tensor:
    """Make two frames of each, of one half of the channels that a convolution over time makes, and of the other."""
    pairs = convolve(module, history.put_before(frames), None).add_up().unflatten(-1, (2, -1))
    return pairs.movedim(-2, 2).flatten(1, 2)


def double_and_convolve(module: nn.Conv2d, frames: torch.Tensor, split: ColumnSplit | None) -> PendingSum:
    """
    Repeat every row and column, then convolve by 3x3 with zeros around.

    Every pixel of the result sees 3x3 pixels, but only 2x2 that are not repetitions. Adding up what the kernel has for
    the same pixel leaves a transposed convolution of 4x4 by a stride of 2.
    """
    (batch, count), (bias, later) = frames.shape[:2], bias_now_and_later(module.bias, frames)
    padding = [1, 1]
    if split is not None:
        # What is made of the neighbors' columns is cut off again.
        frames, padding[split.axis] = put_beside(frames, split), 1 + 2
    # Of the 4x4, each has the sum of those of the 3x3 that meet its pixel or that pixel's repetitions.
    kernel = F.avg_pool2d(module.weight.flip(-2, -1), 2, stride=1, padding=1, divisor_override=1).transpose(0, 1)
    pictures = frames.flatten(0, 1).movedim(-1, 1)
    doubled = F.conv_transpose2d(pictures, kernel, bias, stride=2, padding=padding)
    doubled = doubled.movedim(1, -1).contiguous().unflatten(0, (batch, count))
    return PendingSum(doubled, later)


def add_repeated(doubled: PendingSum, module: DupUp3D, frames: torch.Tensor, first: bool) -> PendingSum:
    """
    Add a block's input, repeated, to its output, in place.

    Args:
        doubled: `[B, T', H', W', C']`.
        module: Says how often frames, rows and columns are repeated; where the input has more channels than the
            output, repetitions are of different ones.
        frames: `[B, T, H, W, C]`.
        first: Whether this is the first frame of a video, of which only the last repetition is there.
    """
    if operators.runs_kernels(frames):
        repetitions = (module.factor_t, module.factor_s, module.repeats)
        operators.add_(doubled.frames, doubled.bias, frames, *repetitions, first)
        return PendingSum(doubled.frames)
    factors = (module.factor_t, module.factor_s, module.factor_s)
    repeated = frames.unsqueeze(-1).expand(*frames.shape, module.repeats)
    repeated = repeated.reshape(*frames.shape[:-1], module.out_channels, *factors)  # mostly a view
    if first:
        repeated = repeated[..., -1:, :, :]
    times, rows, columns = repeated.shape[-3:]
    target = doubled.frames.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).unflatten(1, (-1, times))
    target += repeated.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return doubled
