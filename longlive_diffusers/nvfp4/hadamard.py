"""The random Hadamard transform: spreads an outlier over its 16 neighbors before they share a scale.

Every group of 16 numbers is multiplied by an orthogonal matrix, a Hadamard matrix whose rows have random signs. Both
factors of a matrix product are transformed along the axis that it sums over, so the product is the same:
`(A H)(B H)^T = A B^T`. The signs are drawn once and for all: they are those of TransformerEngine and of LongLive-2.0's
training.
"""

import torch


SIZE = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
NEGATIVE = sum(1 << index for index, sign in enumerate(SIGNS) if sign < 0)  # the bits of the columns with -1


def random_hadamard(x: torch.Tensor) -> torch.Tensor:
    """
    Transform each group of 16 neighbors along the last axis. The result is rounded to bfloat16, as the kernels do, and
    returned in the dtype of `x`.

    Raises:
        ValueError: If the size of the last axis is not a multiple of 16.
    """
    if x.shape[-1] % SIZE:
        raise ValueError(f"The Hadamard transform takes {SIZE} numbers at a time, got {x.shape[-1]} columns.")
    # Computed where they are needed: to copy a list from Python would wait for the GPU, at every call.
    signs = 1 - 2 * ((NEGATIVE >> torch.arange(SIZE, device=x.device)) & 1)
    blocks = x.float().unflatten(-1, (-1, SIZE)) * signs
    # The fast transform: sums and differences of neighbors, four times. A matrix product would leave the order of
    # summation, and so the last bit, to the device.
    for _ in range(SIZE.bit_length() - 1):
        even, odd = blocks[..., ::2], blocks[..., 1::2]
        blocks = torch.cat([even + odd, even - odd], dim=-1)
    return (blocks / SIZE**0.5).flatten(-2).to(torch.bfloat16).to(x.dtype)
