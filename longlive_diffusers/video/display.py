"""What a player shows of a video's frames: upright, with square pixels, in the colors that were meant, and opaque."""

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter
from PIL import Image

from .decoding import Video
from .fit import fit
from .images import over_white


UNSPECIFIED_COLORSPACE = 2  # AVCOL_SPC_UNSPECIFIED of FFmpeg


class Display:
    """
    Shows the frames of one video.

    Attributes:
        height, width: The size of the frames as they are shown.

    Args:
        video: The video. Phones that are held upright record sideways, and front cameras may record mirrored; the
            frames are shown in the orientation that is nearest to the video's display matrix.
    """

    def __init__(self, video: Video) -> None:
        # A pixel at (x, y) is shown at (a x + c y, b x + d y).
        a, b, _, c, d = video.display_matrix or (1, 0, 0, 0, 1)
        self._is_transposed = abs(a) + abs(d) < abs(b) + abs(c)
        self._mirrors_columns, self._mirrors_rows = (c < 0, b < 0) if self._is_transposed else (a < 0, d < 0)
        height, width, aspect = video.height, video.width, video.pixel_aspect
        if self._is_transposed:
            height, width, aspect = width, height, 1 / aspect
        self.height, self.width = height, max(1, round(width * aspect))
        self._pixel_aspect = aspect
        self._reformatter = VideoReformatter()  # one for all frames: each takes megabytes, and may start threads

    def show(self, picture: av.VideoFrame, height: int, width: int) -> np.ndarray:
        """Return a frame as it is shown, resized to cover `height` x `width` and cropped at the center: uint8
        `[height, width, 3]`, RGB. What is transparent is laid over white."""
        pixels = self._colors(picture)
        if self._is_transposed:
            pixels = pixels.transpose(1, 0, 2)
        if self._mirrors_columns:
            pixels = pixels[:, ::-1]
        if self._mirrors_rows:
            pixels = pixels[::-1]
        image = over_white(Image.fromarray(np.ascontiguousarray(pixels)))
        return np.array(fit(image, height, width, self._pixel_aspect))

    def _colors(self, picture: av.VideoFrame) -> np.ndarray:
        """Return a frame's pixels `[H, W, 3]` (RGB), or `[H, W, 4]` (RGBA) if its format has transparency."""
        has_alpha = picture.format.name == "pal8" or any(part.is_alpha for part in picture.format.components)
        colorspace = None
        # Players take high definition for BT.709 if a file does not say what it is; FFmpeg takes all for BT.601.
        is_high_definition = picture.width >= 1280 or picture.height > 576
        if picture.colorspace == UNSPECIFIED_COLORSPACE and is_high_definition and not picture.format.is_rgb:
            colorspace = Colorspace.ITU709
        rgb = self._reformatter.reformat(picture, format="rgba" if has_alpha else "rgb24", src_colorspace=colorspace)
        return rgb.to_ndarray()
