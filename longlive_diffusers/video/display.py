"""What a player shows of a decoded frame: upright, with square pixels, in the colors that were meant, and opaque."""

from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from .decoding import TimedFrame
from .fit import fit
from .images import over_white


UNSPECIFIED_COLORSPACE = 2  # AVCOL_SPC_UNSPECIFIED of FFmpeg


def displayed_size(frame: TimedFrame) -> tuple[int, int]:
    """Return the height and width of a frame as it is shown."""
    height, width, aspect = frame.picture.height, frame.picture.width, frame.pixel_aspect
    if _orientation(frame.picture).is_transposed:
        height, width, aspect = width, height, 1 / aspect
    return height, max(1, round(width * aspect))


def displayed(frame: TimedFrame, height: int, width: int) -> np.ndarray:
    """Return a frame as it is shown, resized to cover `height` x `width` and cropped at the center: uint8
    `[height, width, 3]`, RGB. What is transparent is laid over white."""
    orientation, aspect = _orientation(frame.picture), frame.pixel_aspect
    if orientation.is_transposed:
        aspect = 1 / aspect
    image = Image.fromarray(np.ascontiguousarray(orientation.apply(_colors(frame.picture))))
    return np.array(fit(over_white(image), height, width, aspect))


class _Orientation(NamedTuple):
    """How a stored frame is turned upright: rows and columns are exchanged first, then mirrored."""

    is_transposed: bool
    mirrors_columns: bool
    mirrors_rows: bool

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn pixels `[H, W, C]`; the result is a view."""
        if self.is_transposed:
            pixels = pixels.transpose(1, 0, 2)
        if self.mirrors_columns:
            pixels = pixels[:, ::-1]
        return pixels[::-1] if self.mirrors_rows else pixels


def _orientation(picture: av.VideoFrame) -> _Orientation:
    """Return the orientation that is nearest to a frame's display matrix: phones that are held upright record
    sideways, and front cameras may record mirrored."""
    try:
        matrix = picture.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know some kinds of side data, and then shows none at all
        return _UPRIGHT
    if matrix is None:
        return _UPRIGHT
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _Orientation(False, mirrors_columns=a < 0, mirrors_rows=d < 0)
    return _Orientation(True, mirrors_columns=c < 0, mirrors_rows=b < 0)


_UPRIGHT = _Orientation(False, False, False)


def _colors(picture: av.VideoFrame) -> np.ndarray:
    """Return a frame's pixels `[H, W, 3]` (RGB), or `[H, W, 4]` (RGBA) if its format has transparency."""
    has_alpha = picture.format.name == "pal8" or any(part.is_alpha for part in picture.format.components)
    colorspace = None
    # Players take high definition for BT.709 if the file does not say what it is; FFmpeg takes everything for BT.601.
    is_high_definition = picture.width >= 1280 or picture.height > 576
    if picture.colorspace == UNSPECIFIED_COLORSPACE and is_high_definition and not picture.format.is_rgb:
        colorspace = Colorspace.ITU709
    return picture.to_ndarray(format="rgba" if has_alpha else "rgb24", src_colorspace=colorspace)
