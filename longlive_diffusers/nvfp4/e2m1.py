"""E2M1, the 4-bit float: its sixteen values, rounding to them, and two of them in a byte."""

import torch
from torch.nn import functional as F


MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; 8 to 15 are the same, negative


def round_magnitudes(magnitudes: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Codes 0 to 7, still float32, of numbers that are not negative. What is above 6 becomes 6.

    Args:
        noise: Uniform in [0, 1), as `magnitudes`: rounds up with the chance that makes the average right; None: rounds
            to the nearest value, ties to the even code.
    """
    # Neighbors are 0.5 apart below 2, 1 apart below 4, 2 apart from there on; 2 and 4 are the codes 4 and 6. Of the
    # three rulers, the right one is that which gives least: the others are shifted up, by an even number of codes.
    if noise is None:
        codes = torch.minimum((magnitudes * 2).round(), magnitudes.round() + 2)  # ties to the even one
        codes = torch.minimum(codes, (magnitudes * 0.5).round() + 4)
    else:
        fine, middle, coarse = magnitudes * 2, magnitudes + 2, magnitudes * 0.5 + 4
        codes = (torch.where(magnitudes < 2, fine, torch.where(magnitudes < 4, middle, coarse)) + noise).floor()
    return codes.clamp(max=7)


def magnitudes_of(codes: torch.Tensor) -> torch.Tensor:
    """Values of codes 0 to 7, both float32."""
    return torch.maximum(torch.maximum(codes * 0.5, codes - 2), codes * 2 - 8)


def with_signs(codes: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 7, float32, and float32 numbers, a zero among them with its sign -> codes 0 to 15, uint8."""
    return codes.to(torch.uint8) | (y.view(torch.int32) >> 28 & 8).to(torch.uint8)


def pack(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """Bytes of two codes each, the first of them in the low half."""
    return even | (odd << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """`[..., n / 2]` bytes -> `[..., n]` codes, those of a byte side by side."""
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
