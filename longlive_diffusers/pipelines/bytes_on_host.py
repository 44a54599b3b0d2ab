"""Pixels as bytes: rounded to 8 bits where they were decoded, then copied to the host, a quarter of the floats."""

import numpy as np
import torch


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Round pixels `[B, frames, 3, H, W]` in [0, 1], float32, to uint8 `[B, frames, H, W, 3]`, as `VideoWriter` rounds
    floats."""
    return pixels.mul(255).round_().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


class HostCopier:
    """
    Copies pixels to the host. On a GPU, they come through pinned memory, of which there is one piece for all chunks:
    what is handed out is ordinary memory, since a video that somebody keeps must not be pinned as a whole.
    """

    def __init__(self):
        self._pinned: torch.Tensor | None = None

    def copy(self, pixels: torch.Tensor, sound: torch.Tensor) -> tuple[np.ndarray, bool]:
        """
        Copy to the host, and wait for that.

        Args:
            pixels: The bytes to copy, of any shape.
            sound: A boolean that is copied along, such as whether all pixels are numbers.

        Returns:
            The pixels in memory of their own, and the boolean.
        """
        if pixels.device.type != "cuda":
            return pixels.cpu().numpy(), bool(sound)
        size = pixels.numel()
        if self._pinned is None or self._pinned.numel() <= size:
            self._pinned = torch.empty(size + 1, dtype=torch.uint8, pin_memory=True)
        self._pinned[:size].view(pixels.shape).copy_(pixels, non_blocking=True)
        self._pinned[size].copy_(sound.to(torch.uint8), non_blocking=True)
        torch.cuda.current_stream(pixels.device).synchronize()
        return self._pinned[:size].view(pixels.shape).numpy().copy(), bool(self._pinned[size])
