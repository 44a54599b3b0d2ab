"""H.264 as all of this package's videos have it: yuv420p in BT.709, tagged as such, and nothing kept back."""

from fractions import Fraction

import av
import av.container
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc


ENCODER = "libx264"


def add_h264_stream(
    container: av.container.OutputContainer, *, height: int, width: int, fps: Fraction, crf: float, preset: str
) -> av.VideoStream:
    """Add a stream whose encoder returns each frame as it comes (x264's zero-latency tuning: no B-frames, no
    look-ahead).

    Args:
        container: The container to add it to.
        height, width: The size of the picture; even numbers.
        fps: The number of frames per second.
        crf: x264's constant rate factor.
        preset: x264's preset: how much time it takes for how few bytes.
    """
    options = {"crf": str(crf), "preset": preset, "tune": "zerolatency"}
    stream = container.add_stream(ENCODER, rate=fps, options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    # Untagged, players guess the colors from the size of the picture.
    stream.codec_context.colorspace = Colorspace.ITU709
    stream.codec_context.color_range = ColorRange.MPEG
    stream.codec_context.color_primaries = ColorPrimaries.BT709
    stream.codec_context.color_trc = ColorTrc.BT709
    return stream


def as_video_frame(image: np.ndarray, *, index: int, fps: Fraction, is_key_frame: bool) -> av.VideoFrame:
    """Return frame number `index` of a video, `[H, W, 3]`, uint8, RGB, for the encoder of such a stream."""
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
    frame.pts, frame.time_base = index, 1 / fps
    frame.pict_type = PictureType.I if is_key_frame else PictureType.NONE
    return frame
