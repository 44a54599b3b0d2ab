"""What the frames of a stream are sent as: each frame is complete when it leaves, so that none waits for the next."""

import io
import re
from fractions import Fraction
from typing import Protocol

import av
import av.container
import numpy as np
import PIL.Image

from ..video.h264 import add_h264_stream, as_video_frame


CRF = 20  # x264's constant rate factor
JPEG_QUALITY = 90


class FrameEncoder(Protocol):
    """Encodes the frames of one video, in order. `mime` is the type of what its results join to."""

    mime: str

    def encode(self, frame: np.ndarray, *, is_key_frame: bool) -> bytes: ...


def frame_encoder(media: str, *, height: int, width: int, fps: int) -> FrameEncoder:
    """Return a new encoder for "mp4" or "jpeg"."""
    return JpegEncoder() if media == "jpeg" else FragmentEncoder(height=height, width=width, fps=fps)


class JpegEncoder:
    """Encodes each frame as a picture."""

    mime = "image/jpeg"

    def encode(self, frame: np.ndarray, *, is_key_frame: bool) -> bytes:
        """Encode one frame `[H, W, 3]`, uint8."""
        file = io.BytesIO()
        PIL.Image.fromarray(frame).save(file, "jpeg", quality=JPEG_QUALITY)
        return file.getvalue()


class FragmentEncoder:
    """
    Encodes each frame as a fragment of an mp4 with H.264; the first fragment begins with the initialization segment.

    A muxer keeps the last frame until it knows how long that lasts, which is when the next one comes: a chunk would
    be incomplete until the next is made. So one encoder makes the video, and a muxer for each frame its fragment.

    Args:
        height, width: The size of the frames; even numbers.
        fps: The number of frames per second.
    """

    def __init__(self, *, height: int, width: int, fps: int):
        self._fps, self._count = Fraction(fps), 0
        file = _Bytes()
        # The container is kept for its encoder alone; nothing is ever muxed into it.
        self._container = _muxer(file, number=1)
        self._stream = add_h264_stream(
            self._container, height=height, width=width, fps=self._fps, crf=CRF, preset="ultrafast"
        )
        self._container.start_encoding()
        self._initialization = file.take()
        self.mime = f'video/mp4; codecs="{codec_name(self._initialization)}"'

    def encode(self, frame: np.ndarray, *, is_key_frame: bool) -> bytes:
        """Encode one frame `[H, W, 3]`, uint8."""
        picture = as_video_frame(frame, index=self._count, fps=self._fps, is_key_frame=is_key_frame)
        packets = self._stream.encode(picture)
        self._count += 1
        file = _Bytes()
        with _muxer(file, number=self._count) as muxer:
            stream = muxer.add_stream_from_template(self._stream)
            stream.time_base = self._stream.time_base
            muxer.start_encoding()
            file.take()  # the same initialization again
            for packet in packets:
                packet.stream = stream
                muxer.mux(packet)
        initialization, self._initialization = self._initialization, b""
        return initialization + file.take()


def codec_name(initialization: bytes) -> str:
    """Return the name of the codec in an initialization segment, as browsers ask for it (RFC 6381): profile,
    constraints and level are the bytes after the version of its `avcC` box.

    Raises:
        ValueError: If there is no such box.
    """
    found = re.search(rb"avcC\x01(...)", initialization, re.DOTALL)
    if found is None:
        raise ValueError("This initialization segment has no H.264 stream.")
    return f"avc1.{found[1].hex()}"


def _muxer(file: "_Bytes", *, number: int) -> av.container.OutputContainer:
    options = {
        # With frag_discont and without an edit list, a fragment begins at its own time, not at that of its muxer.
        "movflags": "frag_every_frame+empty_moov+default_base_moof+frag_discont+skip_trailer",
        "use_editlist": "0",
        "avoid_negative_ts": "disabled",
        "fragment_index": str(number),
    }
    return av.open(file, "w", format="mp4", options=options)


class _Bytes:
    """What a muxer writes to."""

    def __init__(self):
        self._parts: list[bytes] = []

    def write(self, data: bytes | memoryview) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def take(self) -> bytes:
        """Return what was written since the last call."""
        data, self._parts = b"".join(self._parts), []
        return data
