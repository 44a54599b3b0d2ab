"""The product of two matrices in NVFP4: in 4 bits where the hardware supports it, else emulated in more bits.

Tensor cores need the block scales of a matrix in tiles of 128 rows by 4 scales, of 512 bytes each ([`swizzle`]).
Within a tile, 16 bytes hold four neighboring scales of rows r, r + 32, r + 64 and r + 96. Rows are padded to 128 and
scales to 4 with zeros. (This is cuBLASLt's layout for 1D block scaling; torch calls it `SWIZZLE_32_4_4`.)
"""

import torch
from torch.nn import functional as F

from ..eager_operator import eager_operator
from .format import NVFP4Tensor, global_scale, in_block_scales


TILE_ROWS, TILE_COLUMNS = 128, 4


def multiply(a: NVFP4Tensor, b: NVFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`A B^T`, `[M, K]` and `[N, K]` -> `[M, N]` in `dtype`: in hardware if the device supports it, else emulated."""
    if hardware_unsupported_reason(a.codes.device, a.shape[1], b.shape[0]) is None:
        return multiply_in_hardware(a, b, swizzle(b.scales)).to(dtype)
    return emulate(a, b, dtype)


def multiply_in_hardware(a: NVFP4Tensor, b: NVFP4Tensor, swizzled_b_scales: torch.Tensor) -> torch.Tensor:
    """Compute `A B^T` on tensor cores, in bfloat16; the scales of `b` are swizzled already."""
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
    Compute `A B^T` as a plain product of the values times their block scales; the global scales are applied to the
    result.

    A value times its block's scale has at most 6 significant bits, so bfloat16 holds it exactly, and a GPU multiplies
    at its usual speed; the terms are those that tensor cores sum, in float32. On a CPU, float32 is faster.
    """
    exact = torch.bfloat16 if a.codes.is_cuda else torch.float32
    left, right = (in_block_scales(factor.codes, factor.scales.float()).to(exact) for factor in (a, b))
    product = left @ right.T
    scale = global_scale(a.amax, a.scale_rule) * global_scale(b.amax, b.scale_rule)
    return (product.float() * scale).to(dtype)


@torch.library.custom_op("longlive_diffusers::nvfp4_matmul", mutates_args=())
def nvfp4_matmul(
    codes: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    other_codes: torch.Tensor,
    other_scales: torch.Tensor,
    other_tensor_scale: torch.Tensor,
) -> torch.Tensor:
    """
    Compute torch's own product `A B^T` of two matrices in NVFP4, on a GPU that supports it. This is a custom operator
    because `torch.compile` cannot lower the plain call (torch 2.13: "does not yet support non-trivial swizzles"), but
    leaves an operator that it does not know as it is.

    Args:
        codes, other_codes: uint8 `[M, K / 2]` and `[N, K / 2]`; K is a multiple of 32, N of 16.
        scales, other_scales: The block scales, float8_e4m3fn, swizzled, 1-D.
        tensor_scale, other_tensor_scale: The global scales, `amax / span`, float32 `[1]`.

    Returns:
        bfloat16 `[M, N]`.
    """
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    layout = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    return F.scaled_mm(
        codes.view(torch.float4_e2m1fn_x2),
        other_codes.view(torch.float4_e2m1fn_x2).t(),
        [scales, tensor_scale],
        recipe,
        [other_scales, other_tensor_scale],
        recipe,
        swizzle_a=layout,
        swizzle_b=layout,
        output_dtype=torch.bfloat16,
    )


@nvfp4_matmul.register_fake
def _(codes, scales, tensor_scale, other_codes, other_scales, other_tensor_scale) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], other_codes.shape[0]), dtype=torch.bfloat16)


@eager_operator("longlive_diffusers::fp8_matmul")
def fp8_matmul(
    codes: torch.Tensor,
    scales: torch.Tensor,
    other_codes: torch.Tensor,
    other_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Compute the product `A B^T` of two matrices in FP8, with one scale for each row of either: on a GPU by torch's own
    operator; on a CPU, where torch 2.11 has none, in float32. This is a custom operator because `torch.compile` cannot
    trace torch's in 2.11.

    Args:
        codes, other_codes: float8_e4m3fn `[M, K]` and `[N, K]`; K and N are multiples of 16.
        scales, other_scales: float32 `[M, 1]` and `[N, 1]`.
        bias: Added before the result is rounded, bfloat16 `[N]`, or None.

    Returns:
        bfloat16 `[M, N]`.
    """
    if not codes.is_cuda:
        product = (codes.float() @ other_codes.float().t()) * scales * other_scales.t()
        return (product if bias is None else product + bias).to(torch.bfloat16)
    row_wise = F.ScalingType.RowWise
    return F.scaled_mm(
        codes,
        other_codes.t(),
        scales,
        row_wise,
        other_scales.t(),
        row_wise,
        bias=bias,
        output_dtype=torch.bfloat16,
        # Hopper's tensor cores then sum in fewer bits than float32 has, as is usual in inference.
        use_fast_accum=True,
    )


@fp8_matmul.register_fake
def _(codes, scales, other_codes, other_scales, bias=None) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], other_codes.shape[0]), dtype=torch.bfloat16)


def connected_to(x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """
    Return a product that an autograd function computed from the codes of `x`, connected to `x` itself.

    While compiling, torch 2.11 looks in the function's forward whether its result depends on an input that needs a
    gradient. Codes are integers, which carry none: without the connection all gradients come out as zeros.
    """
    return product + x[:0].sum() if torch.compiler.is_compiling() else product


def hardware_unsupported_reason(device: torch.device, inner: int, columns: int) -> str | None:
    """Return why tensor cores cannot compute a product that sums over `inner` and has `columns` columns, as the end of
    a sentence; None if they can."""
    if inner % 32 or columns % 16:
        return f"needs inputs in multiples of 32 and outputs of 16, this layer is {inner} -> {columns}"
    if device.type != "cuda":
        return f"needs a GPU of compute capability 10.0 (Blackwell), this is '{device.type}'"
    return capability_unsupported_reason(device, (10, 0), " (Blackwell)")


def capability_unsupported_reason(device: torch.device, needed: tuple[int, int], known_as: str = "") -> str | None:
    """Return why a GPU's compute capability is not sufficient, as the end of a sentence; None if it is."""
    found = torch.cuda.get_device_capability(device)
    if found >= needed:
        return None
    needs, has = (".".join(map(str, capability)) for capability in (needed, found))
    return f"needs a GPU of compute capability {needs}{known_as}, this one has {has}"


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """Return the shape of `rows` by `columns` scales after padding to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """Arrange scales `[rows, cols / 16]` in tiles, 1-D."""
    rows, columns = scales.shape
    padded_rows, padded_columns = padded_shape(rows, columns)
    # As bytes: few operations support this dtype.
    padded = F.pad(scales.view(torch.uint8), (0, padded_columns - columns, 0, padded_rows - rows))
    tiles = padded.reshape(padded_rows // TILE_ROWS, 4, 32, padded_columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)


def unswizzle(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """
    Undo [`swizzle`]: scales in tiles, 1-D -> `[rows, columns]`.

    Raises:
        ValueError: If there are more or fewer scales than the tiles hold.
    """
    padded_rows, padded_columns = padded_shape(rows, columns)
    if scales.numel() != padded_rows * padded_columns:
        raise ValueError(
            f"{rows} x {columns} scales in tiles of 128 x 4 are {padded_rows * padded_columns}, got {scales.numel()}."
        )
    tiles = scales.view(torch.uint8).reshape(padded_rows // TILE_ROWS, padded_columns // TILE_COLUMNS, 32, 4, 4)
    linear = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)
    return linear[:rows, :columns].contiguous().view(scales.dtype)
