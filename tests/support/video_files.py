"""Video files that tests write: of any container, codec, frame times, pixel shape and orientation."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


# Matrices of the eight orientations, as (a, b, c, d): a pixel at (x, y) is shown at (a x + c y, b x + d y).
ORIENTATIONS = {
    "upright": (1, 0, 0, 1),
    "a quarter turn": (0, 1, -1, 0),
    "half a turn": (-1, 0, 0, -1),
    "three quarter turns": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}


def encode_video(
    path: Path,
    frames: np.ndarray,
    *,
    milliseconds: Sequence[int] | None = None,
    fps: int | Fraction = 24,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    pixel_aspect: Fraction | None = None,
    sound_seconds: float = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Write frames `[F, H, W, C]` (RGB or RGBA) in any container, at a constant rate or at the given times; with
    silence, if it should sound. `options` are the container's."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=1000 if milliseconds is not None else fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        if codec.startswith("libx264"):
            stream.options = {"crf": "4", "bf": "0"}
        if codec.startswith("libvpx"):
            stream.options = {"crf": "4", "b": "2M", "deadline": "realtime"}
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        sound = container.add_stream("aac", rate=8000, layout="mono") if sound_seconds else None
        for index, image in enumerate(frames):
            source = "rgba" if image.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=source)
            frame = frame.reformat(format=pixel_format)
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            for start in range(0, int(sound_seconds * 8000), 1024):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 8000, start
                container.mux(sound.encode(samples))
            container.mux(sound.encode(None))
    return path


def orient(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Replace the display matrix of the first track of an mp4."""
    a, b, c, d = (number << 16 if number >= 0 else -(-number << 16) for number in matrix)
    data = bytearray(path.read_bytes())
    position = data.index(b"tkhd") + 4 + 4 + 36  # type, version and flags, then 36 bytes of other fields
    struct.pack_into(">9i", data, position, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def oriented(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Move each pixel of `[H, W, C]` to the place that a matrix gives it: slowly, but as the format is defined."""
    a, b, c, d = matrix
    height, width = pixels.shape[:2]
    places = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(height) for x in range(width)}
    left, top = min(x for x, _ in places), min(y for _, y in places)
    shape = (width, height) if a == 0 else (height, width)
    result = np.zeros((*shape, pixels.shape[2]), pixels.dtype)
    for (x, y), value in places.items():
        result[y - top, x - left] = value
    return result
