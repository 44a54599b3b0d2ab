"""E2M1, the 4-bit float: its sixteen values, rounding to them, and packing two of them into a byte."""

import torch
from torch.nn import functional as F


MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; codes 8 to 15 are their negatives


def round_magnitudes(magnitudes: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Round nonnegative numbers to codes 0 to 7, returned as float32. Numbers above 6 become 6.

    Args:
        magnitudes: Nonnegative numbers, float32.
        noise: Uniform in [0, 1), in the shape of `magnitudes`: rounds up with the probability that makes the result
            right on average; None: rounds to the nearest value, ties to the even code.
    """
    # Neighbors are 0.5 apart below 2, 1 apart below 4, and 2 apart from there on; 2 and 4 have the codes 4 and 6. Each
    # spacing gives a candidate, and the smallest candidate is the right one. The wider spacings are shifted by an even
    # number of codes, which keeps ties on even codes.
    if noise is None:
        codes = torch.minimum((magnitudes * 2).round(), magnitudes.round() + 2)  # ties to even
        codes = torch.minimum(codes, (magnitudes * 0.5).round() + 4)
    else:
        fine, middle, coarse = magnitudes * 2, magnitudes + 2, magnitudes * 0.5 + 4
        codes = (torch.where(magnitudes < 2, fine, torch.where(magnitudes < 4, middle, coarse)) + noise).floor()
    return codes.clamp(max=7)


def magnitudes_of(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of codes 0 to 7; both are float32."""
    return torch.maximum(torch.maximum(codes * 0.5, codes - 2), codes * 2 - 8)


def with_signs(codes: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Give codes 0 to 7, float32, the signs of float32 numbers (also of zeros): codes 0 to 15, uint8."""
    return codes.to(torch.uint8) | (y.view(torch.int32) >> 28 & 8).to(torch.uint8)


def pack(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """Pack pairs of codes into bytes, the even ones into the low halves."""
    return even | (odd << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """`[..., n / 2]` bytes -> `[..., n]` codes; the two codes of a byte become neighbors."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def unpack_values(packed: torch.Tensor) -> torch.Tensor:
    """`[..., n / 2]` bytes -> `[..., n]` values, float32: a lookup in a table of all pairs, which is fast on a CPU."""
    values = _values(packed.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=-1)  # [byte, (low, high)]
    return F.embedding(packed.int(), pairs).flatten(-2)


def _values(device: torch.device) -> torch.Tensor:
    # Computed where it is needed: to copy a list from Python would wait for the GPU, at every call.
    magnitudes = magnitudes_of(torch.arange(8, dtype=torch.float32, device=device))
    return torch.cat([magnitudes, -magnitudes])
