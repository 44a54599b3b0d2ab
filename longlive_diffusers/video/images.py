"""Pictures as a viewer shows them: of every mode that Pillow opens, to upright, opaque RGB."""

import io
import os
import struct
import subprocess
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .input_file import existing_file
from .levels import ROUNDING, white_level


# What Pillow raises for damaged files, besides OSError: a SyntaxError for a PNG, a RuntimeError for an AVIF, for a DDS
# one that is a NotImplementedError, an AttributeError for a SPIDER, a TypeError for an IM, and for an EPS the error of
# Ghostscript's process. No format promises which.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    TypeError,
    struct.error,
    zlib.error,
    subprocess.SubprocessError,
    Image.DecompressionBombError,
)


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read a picture as RGB, as a viewer shows it (see [`as_rgb`]); of an animation, the first frame.

    Raises:
        ValueError: If there is no such file, it is not a picture, it is damaged, or it has more pixels than Pillow
            reads (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    path = existing_file(path, "image")
    file = io.BytesIO(path.read_bytes()) if path.is_fifo() else path  # Pillow goes back and forth
    try:
        return open_as_rgb(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"'{path}' cannot be read as an image: its format is not known") from error
    except DAMAGED as error:
        raise ValueError(f"'{path}' cannot be read as an image: {error}") from error


def open_as_rgb(
    file: BinaryIO | Path, *, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """
    Open a picture as RGB, see [`as_rgb`]; of an animation, the first frame.

    Args:
        file: The file, open or by its path.
        formats: The formats that are tried, by Pillow's names; all that it knows by default.
        max_pixels: The most pixels that are decoded.

    Raises:
        PIL.UnidentifiedImageError: If it is in none of the formats.
        ValueError: If it has more pixels.
        OSError: If it is damaged, or another of the errors of `DAMAGED`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large but not too large, or something odd about its tags
        with Image.open(file, formats=formats) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width}x{image.height} pixels; at most {max_pixels} are allowed")
            image.load()
            return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """
    Convert a picture of any mode of Pillow's to RGB, as a viewer shows it: turned upright as its EXIF data say, with
    what is transparent laid over white. Gray of 16 bits ("I;16") is a fraction of 65535. Gray in integers of 32 bits
    ("I") is of 8 bits if it is nowhere above 255, else of 16; gray in floats ("F") is in [0, 1], or else in [0, 255].

    Raises:
        ValueError: For gray outside of these ranges, a picture whose file is damaged, or an impossible transparency.
    """
    try:
        image = ImageOps.exif_transpose(image)
    except DAMAGED as error:
        raise ValueError(f"the picture cannot be read: {error}") from error
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _gray_of_8_bits(image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # only a conversion in place returns nothing
        return converted
    return over_white(image)


def over_white(image: Image.Image) -> Image.Image:
    """Return a picture as RGB, with what is transparent laid over white.

    Raises:
        ValueError: If what the picture says to be transparent is not possible.
    """
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if not image.has_transparency_data:
        return image.convert("RGB")
    try:
        image = image.convert("RGBA")
    except (TypeError, ValueError) as error:  # more entries than the palette has, or not one for each channel
        raise ValueError(f"the picture's transparency cannot be read: {error}") from error
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _gray_of_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "I":
        white = white_level("gray of 32 bits", [values])
    elif image.mode == "F":
        # Pillow's own conversions to "F" keep the levels of 8 bits.
        white = 255.0 if 1 + ROUNDING < values.max() <= 255 else 1.0
        white *= white_level("gray in floats", [values / np.float32(white)])
    else:
        white = 65535.0
    return Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
