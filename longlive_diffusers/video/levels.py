"""Which number is white in an array of pixels: that depends on its dtype, and on the numbers that it holds."""

from collections.abc import Sequence

import numpy as np


# Floats are in [0, 1]; what rounding adds, a quarter of a level of 8 bits, is clipped.
ROUNDING = 1e-3


def white_level(name: str, arrays: Sequence[np.ndarray]) -> float:
    """
    Return the number that is white in arrays of one dtype that belong together, like the frames of a video; 0 is
    black.

    Floats are in [0, 1]. Integers of any dtype are taken for 8 bits (255 is white) if none is larger, those of more
    than 16 bits for 16 (65535) if none is larger than that, and else white is the largest number of their dtype.

    Args:
        name: What the arrays are, for messages.
        arrays: The arrays, not empty.

    Raises:
        ValueError: For numbers that are negative, not finite, too large for this, or of another kind; and for integers
            so small beside the largest of their dtype that all of the picture would be black.
    """
    dtype = arrays[0].dtype
    if dtype.kind not in "buif":
        raise ValueError(f"{name} must hold numbers of a picture, got {dtype}.")
    # By NumPy, whose smallest and largest are not numbers where one is none; Python's may be.
    least, most = np.min([array.min() for array in arrays]), np.max([array.max() for array in arrays])
    if dtype.kind == "f":
        if not (np.isfinite(least) and np.isfinite(most)):
            raise ValueError(f"{name} has values that are not finite.")
        if least < -ROUNDING or most > 1 + ROUNDING:
            raise ValueError(f"{name} must hold floats in [0, 1], or integers; got {dtype} in [{least:g}, {most:g}].")
        return 1.0
    if dtype.kind == "b":
        return 1.0
    if least < 0:
        raise ValueError(f"{name} must not be negative, got {dtype} in [{least}, {most}].")
    if most <= 255:
        return 255.0
    if most <= 65535 and dtype.itemsize > 2:
        return 65535.0
    white = float(np.iinfo(dtype).max)
    if most < white / 256:
        raise ValueError(
            f"{name} holds {dtype} up to {most}, which is neither 8 bits (up to 255) nor 16 (up to 65535), and would "
            f"be black beside {white:.0f}: pass floats in [0, 1]."
        )
    return white
