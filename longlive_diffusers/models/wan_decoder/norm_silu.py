"""RMS norm over channels, and SiLU. Both are computed in float32 (at least), and rounded once."""

import torch
import torch.nn.functional as F

from . import operators
from .cached_convolutions import KEPT
from .pending_sum import PendingSum


SMALLEST_NORM = 1e-12  # that of `F.normalize`


def rms_norm(frames: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """
    Divide each pixel by the root mean square of its channels.

    Args:
        frames: `[..., C]`.
        gamma: A factor for each channel, in any shape of C elements.

    Returns:
        The result in float32, or in float64 if the frames are.
    """
    dtype, channels = torch.promote_types(frames.dtype, torch.float32), frames.shape[-1]
    norm = torch.linalg.vector_norm(frames, dim=-1, keepdim=True, dtype=dtype).clamp_min_(SMALLEST_NORM)
    return (frames / norm).mul_(gamma.flatten().to(dtype) * channels**0.5)


def norm_silu_after(
    kept: torch.Tensor, features: PendingSum, gamma: torch.Tensor, adds_up: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Put what is kept of earlier frames before these ones, which are normalized and activated.

    Args:
        kept: `[B, 2, H, W, C]`, normalized already.
        features: `[B, T, H, W, C]`.
        gamma: The norm's factor for each channel.
        adds_up: Whether the features are needed afterwards: a kernel that adds them up writes their sum, too.

    Returns:
        Both together, `[B, 2 + T, H, W, C]`, of the dtype of the features; and a copy of the last two.
    """
    frames = features.frames
    if operators.runs_kernels(frames):
        returns_sum = adds_up and features.is_pending
        joined, kept_after, total = operators.norm_silu_after(
            kept, frames, gamma, features.bias, features.shortcut, returns_sum
        )
        if returns_sum:
            features.settle(total)
        return joined, kept_after
    batch, count, *shape = frames.shape
    joined = frames.new_empty(batch, KEPT + count, *shape)
    joined[:, :KEPT].copy_(kept)
    joined[:, KEPT:].copy_(F.silu(rms_norm(frames, gamma), inplace=True))
    return joined, last_frames(joined)


def last_frames(frames: torch.Tensor) -> torch.Tensor:
    """Return what a convolution keeps of its input: a copy, as a view would hold all of it."""
    return frames[:, -KEPT:].clone(memory_format=torch.contiguous_format)
