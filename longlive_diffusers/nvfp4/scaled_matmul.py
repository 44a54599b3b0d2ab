"""torch's own NVFP4 matrix product, as an operator of its own: `torch.compile` cannot lower the plain call (torch
2.13: "does not yet support non-trivial swizzles"), and what it does not know it leaves as it is."""

import torch
from torch.nn import functional as F


@torch.library.custom_op("longlive_diffusers::nvfp4_matmul", mutates_args=())
def nvfp4_matmul(
    codes: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    other_codes: torch.Tensor,
    other_scales: torch.Tensor,
    other_global_scale: torch.Tensor,
) -> torch.Tensor:
    """
    `A B^T` of two matrices in NVFP4, on a GPU that multiplies them.

    Args:
        codes, other_codes: uint8 `[M, K / 2]` and `[N, K / 2]`; K a multiple of 32, N of 16.
        scales, other_scales: float8_e4m3fn, swizzled (`swizzle.py`), 1-D.
        global_scale, other_global_scale: float32 `[1]`: `amax / span`.

    Returns:
        bfloat16 `[M, N]`.
    """
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    layout = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    return F.scaled_mm(
        codes.view(torch.float4_e2m1fn_x2),
        other_codes.view(torch.float4_e2m1fn_x2).t(),
        [scales, global_scale],
        recipe,
        [other_scales, other_global_scale],
        recipe,
        swizzle_a=layout,
        swizzle_b=layout,
        output_dtype=torch.bfloat16,
    )


@nvfp4_matmul.register_fake
def _(codes, scales, global_scale, other_codes, other_scales, other_global_scale) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], other_codes.shape[0]), dtype=torch.bfloat16)
