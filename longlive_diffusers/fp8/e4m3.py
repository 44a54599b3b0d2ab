"""Numbers in E4M3 (float8_e4m3fn), as codes of a byte, with scales that are powers of two.

E4M3 has three bits behind the point and eighteen octaves, so a scale need not be near the largest number: what is
cached keeps the scale of a video's first forward, with room for numbers that are several times as large. And a power
of two is exact: codes times their scale are numbers of bfloat16, float16 and float32 without another rounding.
"""

import torch


LARGEST = 448.0
MOST_OCTAVES = 100  # of a scale or its inverse, so that both are normal numbers of float32
ROOM = 8.0
"""How many times as large as the first numbers later ones may be; what is larger still is cut off."""


def scales_of(states: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Return the power of two that brings the largest number along `dims` to between 28 and 56; 1 where all are 0, and
    2^-100 where they are tiny."""
    amax = states.detach().abs().amax(dim=dims).float()
    exponent = torch.frexp(amax * (ROOM / LARGEST)).exponent.clamp(-MOST_OCTAVES, MOST_OCTAVES)
    return torch.where(amax > 0, torch.ldexp(torch.ones_like(amax), exponent), 1.0)


def to_codes(states: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """Round `states * factor` to E4M3, cutting off what is beyond 448; uint8, in the shape of `states`."""
    scaled = (states.detach().float() * factor).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def from_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that codes stand for, exactly."""
    return codes.view(torch.float8_e4m3fn).to(dtype)
