"""Bring a picture to the size of a video without squashing it, or choose the size of a video by that of a picture."""

import math
from fractions import Fraction

from PIL import Image


MOST_OBLONG = 8  # long side over short side, of a size that is chosen by the shape of a picture


def fit(image: Image.Image, height: int, width: int, pixel_aspect: Fraction = Fraction(1)) -> Image.Image:
    """
    Return the largest centered part of a picture that has the shape `height` x `width`, resized to that size (bicubic,
    antialiased). A picture that has this size already is not changed.

    Args:
        image: The picture, of a mode that Pillow can resize: "RGB", or "F" for one channel of floats.
        height, width: The size to return.
        pixel_aspect: The width of a pixel of `image`, in units of its height. The pixels returned are square.
    """
    shape = float(Fraction(width, height) / pixel_aspect)  # of the part, in pixels of the picture
    part_width, part_height = min(image.width, image.height * shape), min(image.height, image.width / shape)
    left, top = (image.width - part_width) / 2, (image.height - part_height) / 2
    box = (left, top, left + part_width, top + part_height)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def size_like(
    shape: tuple[int, int],
    default: tuple[int, int],
    step: tuple[int, int],
    height: int | None = None,
    width: int | None = None,
) -> tuple[int, int]:
    """
    Return the height and width of a video that begins with a picture: of the picture's shape, as nearly as whole
    tokens allow, and with about as many pixels as the default. Of pictures beyond 1:8, the middle is shown.

    Args:
        shape: The height and width of the picture.
        default: The height and width that the video would have without the picture.
        step: The height and width of a token, in pixels.
        height, width: What is asked for, or None. If it is one of them, the other follows the shape.
    """
    aspect = min(max(shape[1] / shape[0], 1 / MOST_OBLONG), MOST_OBLONG)
    ideal = math.sqrt(default[0] * default[1] / aspect) if width is None else width / aspect
    if height is None:
        height = max(1, round(ideal / step[0])) * step[0]
        if width is None:
            width = max(1, round(ideal * aspect / step[1])) * step[1]
    return height, width or max(1, round(height * aspect / step[1])) * step[1]


def size_within(most: int, size: tuple[int, int], step: tuple[int, int]) -> tuple[int, int]:
    """
    Return the largest height and width of the same shape, as nearly as whole tokens allow, of at most so many pixels.

    Args:
        most: The number of pixels.
        size: The height and width, which are returned if they have no more.
        step: The height and width of a token, in pixels.

    Raises:
        ValueError: If that is less than a token.
    """
    factor = math.sqrt(min(1.0, most / (size[0] * size[1])))
    height, width = (int(side * factor + 1e-9) // token * token for side, token in zip(size, step, strict=True))
    if not height or not width:
        raise ValueError(
            f"{most} pixels are too few for a picture of the shape {size[0]} x {size[1]}, which is made of tokens of "
            f"{step[0]} x {step[1]} pixels"
        )
    return height, width
