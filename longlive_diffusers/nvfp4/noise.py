"""Random numbers for stochastic rounding: one for each element, the same on every device.

Each is a hash of a seed of 64 bits and of the element's place, so that a kernel makes them where it needs them, in any
order and of any tiling, and a CPU can say what a GPU will do. The seed is drawn where the tensor is: nothing waits.
"""

import torch


# Of "lowbias32", a hash of 32 bits by two multiplications and three shifts (C. Wellons, "Prospecting for hash
# functions", 2018), found by search for least bias.
SHIFTS, FACTORS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """Two numbers of 32 bits, int64 `[2]` on `device`."""
    return torch.randint(0, 2**32, (2,), device=device, generator=generator, dtype=torch.int64)


def uniform_noise(seed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """float32 in [0, 1), a function of the seed and of each element's index in row-major order."""
    index = torch.arange(shape.numel(), device=seed.device)
    first, second = seed.to(torch.int32)  # 32 bits of a larger number: all that is needed, and signs mean nothing
    state = _mix(index.to(torch.int32).bitwise_xor_(first)).add_(second)
    if shape.numel() > 2**32:
        state += (index >> 32).to(torch.int32)
    return _shifted(_mix(state), 8).float().mul_(2**-24).reshape(shape)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """Of 32 bits in int32, in place; sums and products wrap around."""
    for shift, factor in zip(SHIFTS, (*FACTORS, None), strict=True):
        state.bitwise_xor_(_shifted(state, shift))
        if factor is not None:
            state.mul_(factor - 2**32 if factor >= 2**31 else factor)
    return state


def _shifted(state: torch.Tensor, places: int) -> torch.Tensor:
    """To the right, zeros from the left: int32 would be filled up with its sign."""
    return (state >> places).bitwise_and_((1 << 32 - places) - 1)
