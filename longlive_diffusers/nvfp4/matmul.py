"""The product of two matrices in NVFP4, in 4 bits where the hardware has it, and the same numbers where it has not."""

import torch

from .format import NVFP4Tensor, global_scale, in_block_scales
from .scaled_matmul import nvfp4_matmul
from .swizzle import swizzle


def why_not_in_hardware(device: torch.device, inner: int, columns: int) -> str | None:
    """What keeps tensor cores from a product that sums over `inner` and has `columns` columns, as the end of a
    sentence; None: nothing does."""
    if inner % 32 or columns % 16:
        return f"needs inputs in multiples of 32 and outputs of 16, this layer is {inner} -> {columns}"
    if device.type != "cuda":
        return f"needs a GPU of compute capability 10.0 (Blackwell), this is '{device.type}'"
    return why_too_old(device, (10, 0), " (Blackwell)")


def why_too_old(device: torch.device, wanted: tuple[int, int], known_as: str = "") -> str | None:
    """That a GPU's compute capability is below the one that is wanted, as the end of a sentence; None: it is not."""
    found = torch.cuda.get_device_capability(device)
    if found >= wanted:
        return None
    needs, has = (".".join(map(str, capability)) for capability in (wanted, found))
    return f"needs a GPU of compute capability {needs}{known_as}, this one has {has}"


def multiply(a: NVFP4Tensor, b: NVFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`A B^T`, `[M, K]` and `[N, K]` -> `[M, N]` in `dtype`: in hardware where there is one, else emulated."""
    if why_not_in_hardware(a.codes.device, a.shape[1], b.shape[0]) is None:
        return multiply_in_hardware(a, b, swizzle(b.scales)).to(dtype)
    return emulate(a, b, dtype)


def multiply_in_hardware(a: NVFP4Tensor, b: NVFP4Tensor, swizzled_b_scales: torch.Tensor) -> torch.Tensor:
    """`A B^T` in tensor cores, bfloat16; the scales of `b` are in their tiles already."""
    return nvfp4_matmul(
        a.codes,
        swizzle(a.scales),
        global_scale(a.amax, a.scale_rule),
        b.codes,
        swizzled_b_scales,
        global_scale(b.amax, b.scale_rule),
    )


def emulate(a: NVFP4Tensor, b: NVFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    `A B^T` by plain products of what the codes stand for, without the global scales, which are applied to the result.

    A value times its block's scale has at most 6 significant bits, so bfloat16 holds it exactly, and a GPU multiplies
    as fast as ever; what is summed is what tensor cores sum, in float32. On a CPU float32 is faster.
    """
    exact = torch.bfloat16 if a.codes.is_cuda else torch.float32
    left, right = (in_block_scales(factor.codes, factor.scales.float()).to(exact) for factor in (a, b))
    product = left @ right.T
    scale = global_scale(a.amax, a.scale_rule) * global_scale(b.amax, b.scale_rule)
    return (product.float() * scale).to(dtype)
