"""Random numbers for stochastic rounding: one for each element, the same on every device.

Each is a hash of a seed of 64 bits and of the element's place, so that a kernel makes them where it needs them, in any
order and of any tiling, and a CPU can say what a GPU will do. The seed is drawn where the tensor is: nothing waits.
"""

import torch


# Of "lowbias32", a hash of 32 bits by two multiplications and three shifts (C. Wellons, "Prospecting for hash
# functions", 2018), found by search for least bias.
SHIFTS, FACTORS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
_MASK = 0xFFFFFFFF


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """Two numbers of 32 bits, int64 `[2]` on `device`."""
    return torch.randint(0, 2**32, (2,), device=device, generator=generator, dtype=torch.int64)


def uniform_noise(seed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """float32 in [0, 1), a function of the seed and of each element's index in row-major order."""
    index = torch.arange(shape.numel(), device=seed.device)
    state = _mix(index & _MASK ^ seed[0])
    state = _mix((state + seed[1] + (index >> 32)) & _MASK)
    return ((state >> 8).float() * 2**-24).reshape(shape)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """Of 32-bit numbers in int64; products wrap around, which leaves their lower half right."""
    first, second, third = SHIFTS
    state = (state ^ (state >> first)) * FACTORS[0] & _MASK
    state = (state ^ (state >> second)) * FACTORS[1] & _MASK
    return state ^ (state >> third)
