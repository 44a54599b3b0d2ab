"""The order in which tensor cores want the block scales of a matrix: tiles of 128 rows by 4 scales, of 512 bytes each.

Within a tile, 16 bytes hold four neighbouring scales of rows r, r + 32, r + 64 and r + 96. Rows are padded to 128 and
scales to 4 with zeros. (cuBLASLt's layout for 1D block scaling; torch calls it `SWIZZLE_32_4_4`.)
"""

import torch
from torch.nn import functional as F


TILE_ROWS, TILE_COLUMNS = 128, 4


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of `rows` by `columns` scales, in whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """`[rows, cols / 16]` -> 1-D, in tiles."""
    rows, columns = scales.shape
    padded_rows, padded_columns = padded_shape(rows, columns)
    # As bytes: few operations know this dtype.
    padded = F.pad(scales.view(torch.uint8), (0, padded_columns - columns, 0, padded_rows - rows))
    tiles = padded.reshape(padded_rows // TILE_ROWS, 4, 32, padded_columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)


def unswizzle(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """
    1-D, in tiles -> `[rows, columns]`.

    Raises:
        ValueError: Their number is not that of the tiles.
    """
    padded_rows, padded_columns = padded_shape(rows, columns)
    if scales.numel() != padded_rows * padded_columns:
        raise ValueError(
            f"{rows} x {columns} scales in tiles of 128 x 4 are {padded_rows * padded_columns}, got {scales.numel()}."
        )
    tiles = scales.view(torch.uint8).reshape(padded_rows // TILE_ROWS, padded_columns // TILE_COLUMNS, 32, 4, 4)
    linear = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)
    return linear[:rows, :columns].contiguous().view(scales.dtype)
