"""Quantizing rows to FP8, as an operator of torch; without Triton it exists, and cannot be run."""

from functools import partial
from typing import Any

import torch

from ..eager_operator import eager_operator
from ..triton_launch import launch_from, next_power_of_two, warps_for


launch = partial(launch_from, f"{__package__}.kernels")


def has_fp8_instructions(device: torch.device) -> bool:
    """Whether the device has an instruction that converts to E4M3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@eager_operator("longlive_diffusers::fp8_quantize_rows")
def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to FP8, as `rows.rows_to_fp8` does, in one pass.

    Args:
        x: float32, bfloat16 or float16 `[rows, cols]`, with any strides; cols is a multiple of 8.

    Returns:
        float8_e4m3fn `[rows, cols]`, and the scales of the rows, float32 `[rows, 1]`.
    """
    rows, columns = x.shape
    codes, scales = empty_rows(rows, columns, x.device)
    launch(
        "quantize_rows_kernel", (rows,), x,
        x, codes.view(torch.uint8), scales, columns, *x.stride(), **row_constants(columns, x.device),
    )  # fmt: skip
    return codes, scales


@quantize_rows.register_fake
def _(x) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    return empty_rows(rows, columns, x.device)


def empty_rows(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate what [`quantize_rows`] returns.

    Raises:
        ValueError: If the columns are not a multiple of 8: so many codes are stored together.
    """
    if columns % 8:
        raise ValueError(f"Rows in FP8 have multiples of 8 numbers, got {columns}.")
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty(rows, 1, dtype=torch.float32, device=device)


def row_constants(columns: int, device: torch.device) -> dict[str, Any]:
    """The constants of a kernel that quantizes a row in each program, which holds all of it, and at least four numbers
    for each thread: so many are converted together."""
    block = max(128, next_power_of_two(columns))
    return {"BLOCK": block, "PTX": has_fp8_instructions(device), "num_warps": warps_for(columns)}
