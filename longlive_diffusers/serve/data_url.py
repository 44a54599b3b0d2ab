"""Pictures that clients send, as data URLs: from strangers, so that little is taken of each."""

import base64
import io

import PIL.Image

from ..video.images import DAMAGED, open_as_rgb
from .messages import MAX_IMAGE_BYTES


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_IMAGE_PIXELS = 25_000_000


def decode_image(url: str) -> PIL.Image.Image:
    """
    Decode a picture that a client sent as a data URL, to RGB.

    Raises:
        ValueError: If it is no picture in one of `IMAGE_FORMATS`, damaged, or too large; the text is for the client.
    """
    try:
        data = base64.b64decode(url.partition(";base64,")[2], validate=True)
    except ValueError:  # binascii's, and that of characters beyond ASCII
        raise ValueError("image is not valid base64.") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"image has {len(data)} bytes; at most {MAX_IMAGE_BYTES} are allowed.")
    try:
        return open_as_rgb(io.BytesIO(data), formats=IMAGE_FORMATS, max_pixels=MAX_IMAGE_PIXELS)
    except PIL.Image.DecompressionBombError:
        raise ValueError(f"image has more than the {MAX_IMAGE_PIXELS} pixels that are allowed.") from None
    except PIL.UnidentifiedImageError:  # whose text names an object in memory
        raise ValueError(f"image is none of {', '.join(IMAGE_FORMATS)}.") from None
    except DAMAGED as error:
        raise ValueError(f"image cannot be read: {str(error).removesuffix('.')}.") from error
