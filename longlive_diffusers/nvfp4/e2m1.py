"""E2M1, the 4-bit float: its sixteen values, rounding to them, and two of them in a byte."""

import torch
from torch.nn import functional as F


MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; 8 to 15 are the same, negative


def encode(y: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Codes 0 to 15, uint8, of float32 numbers. What is above 6 becomes 6; a zero keeps its sign.

    Args:
        noise: Uniform in [0, 1), as `y`: rounds up with the chance that makes the average right; None: rounds to the
            nearest value, ties to the even code.
    """
    size = y.abs()
    if noise is None:
        codes = torch.zeros_like(size, dtype=torch.uint8)
        # Each border between two codes belongs to the even one of them.
        for border, upper_is_even in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
            codes += size >= border if upper_is_even else size > border
    else:
        # Neighbours are 0.5 apart below 2, 1 apart below 4, 2 apart from there on; 2 and 4 are the codes 4 and 6.
        fine, middle, coarse = size * 2, size + 2, size * 0.5 + 4
        steps = torch.where(size < 2, fine, torch.where(size < 4, middle, coarse))
        codes = (steps + noise).floor().clamp(max=7).to(torch.uint8)
    return codes | (torch.signbit(y).to(torch.uint8) << 3)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Values of codes 0 to 15, float32."""
    return _values(codes.device)[codes.int()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """`[..., n]` codes -> `[..., n / 2]` bytes, the even one in the low half."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """`[..., n / 2]` bytes -> `[..., n]` codes."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def unpack_values(packed: torch.Tensor) -> torch.Tensor:
    """`[..., n / 2]` bytes -> `[..., n]` values, float32: one look at a table of all pairs, which is what is fast on a
    CPU."""
    values = _values(packed.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=-1)  # [byte, (low, high)]
    return F.embedding(packed.int(), pairs).flatten(-2)


def _values(device: torch.device) -> torch.Tensor:
    magnitudes = torch.tensor(MAGNITUDES, device=device)
    return torch.cat([magnitudes, -magnitudes])
