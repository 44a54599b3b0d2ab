"""Random numbers for stochastic rounding: one for each element, the same on every device.

Each is a hash of a seed of 64 bits and of the element's index, so that a kernel can compute them where it needs them,
in any order and with any tiling, and a CPU can reproduce what a GPU does. The seed is drawn on the tensor's device, so
nothing waits for it.
"""

import torch


# The constants of "lowbias32", a hash of 32 bits by two multiplications and three shifts (C. Wellons, "Prospecting for
# hash functions", 2018), found by a search for the least bias.
SHIFTS, FACTORS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw two numbers of 32 bits, int64 `[2]` on `device`."""
    return torch.randint(0, 2**32, (2,), device=device, generator=generator, dtype=torch.int64)


def uniform_noise(seed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return float32 in [0, 1), a function of the seed and of each element's index in row-major order."""
    index = torch.arange(shape.numel(), device=seed.device)
    first, second = seed.to(torch.int32)  # the low 32 bits: all that is needed, and signs mean nothing
    state = _mix(index.to(torch.int32).bitwise_xor_(first)).add_(second)
    if shape.numel() > 2**32:
        state += (index >> 32).to(torch.int32)
    return _shifted(_mix(state), 8).float().mul_(2**-24).reshape(shape)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """Hash 32 bits held in int32, in place; sums and products wrap around."""
    for shift, factor in zip(SHIFTS, (*FACTORS, None), strict=True):
        state.bitwise_xor_(_shifted(state, shift))
        if factor is not None:
            state.mul_(factor - 2**32 if factor >= 2**31 else factor)
    return state


def _shifted(state: torch.Tensor, places: int) -> torch.Tensor:
    """Shift to the right and fill up with zeros: `>>` alone would fill up with the sign of int32."""
    return (state >> places).bitwise_and_((1 << 32 - places) - 1)
