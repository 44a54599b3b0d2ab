"""Bring a picture to the size of a video without squashing it: resized to cover that size, and cropped at the center."""

from fractions import Fraction

from PIL import Image


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
