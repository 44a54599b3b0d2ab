"""Sums of features that are added up by whatever reads them next."""

from dataclasses import dataclass

import torch

from . import operators


@dataclass
class PendingSum:
    """
    Features, and what is still to be added to them.

    On a GPU a convolution's bias and a shortcut would each be added in a pass of its own, that of the bias a slow one.
    The kernel that reads the features next adds both on its way, in float32. Where there are no kernels, everything is
    added at once.

    Args:
        frames: `[B, T, H, W, C]`; nobody else needs them, as the sum may take their place.
        bias: `[C]`.
        shortcut: `[B, T, H, W, C]`.
    """

    frames: torch.Tensor
    bias: torch.Tensor | None = None
    shortcut: torch.Tensor | None = None

    @property
    def is_pending(self) -> bool:
        """Whether anything is still to be added."""
        return self.bias is not None or self.shortcut is not None

    def plus(self, shortcut: torch.Tensor) -> "PendingSum":
        """Return the sum of this one, which has no shortcut, and `shortcut`; this one is not to be used afterwards."""
        if operators.runs_kernels(self.frames):
            return PendingSum(self.frames, self.bias, shortcut)
        return PendingSum(self.frames.add_(shortcut))

    def add_up(self) -> torch.Tensor:
        """Return the sum, `[B, T, H, W, C]`."""
        if self.is_pending:
            operators.add_(self.frames, self.bias, self.shortcut)
            self.settle(self.frames)
        return self.frames

    def settle(self, total: torch.Tensor) -> None:
        """Hold the sum, which somebody has added up, and no longer what it is made of."""
        self.frames, self.bias, self.shortcut = total, None, None


def bias_now_and_later(
    bias: torch.Tensor | None, frames: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the bias that a convolution of these features is to add, and the one that its result is still to get."""
    return (None, bias) if operators.runs_kernels(frames) else (bias, None)
