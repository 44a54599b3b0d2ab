"""Read the files that a user passes on the command line: a video to continue, an image to begin with."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import av
import av.container
import av.error
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def read_video(path: str | os.PathLike, *, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """Read a video's first frames.

    A file that breaks off (its writer was interrupted) is read as far as it goes, with a warning.

    Args:
        path: The path of a video file, in any format that PyAV reads. Frames are rotated upright as the file says.
        max_frames: How many frames are read at most; all frames if `None`.

    Returns:
        The frames, uint8 [F, H, W, 3], RGB, and the number of frames per second.

    Raises:
        ValueError: If there is no such file, it is not a video, none of its frames can be decoded, the frame rate is
            not known, or `max_frames` is less than 1.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, but it is {max_frames}")
    path = _existing_file(path, "video")
    frames: list[np.ndarray] = []
    is_complete = True
    with open_video(path) as (container, stream):
        fps = stream.average_rate or stream.guessed_rate
        try:
            for frame in decode_frames(container, stream):
                frames.append(upright(frame))
                if len(frames) == max_frames:
                    break
        except BreaksOffError:
            is_complete = False
    if not frames:
        raise ValueError(f"none of the frames of '{path}' can be decoded")
    if not fps:
        raise ValueError(f"'{path}' does not say its frame rate ({len(frames)} frame(s) were read)")
    if not is_complete:
        warnings.warn(f"'{path}' is damaged or incomplete: it was read up to frame {len(frames)}", stacklevel=2)
    return np.stack(frames), float(fps)


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read an image as RGB, rotated upright as its EXIF data say.

    Raises:
        ValueError: If there is no such file, it is not an image, or it is damaged.
    """
    path = _existing_file(path, "image")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"'{path}' cannot be read as an image: its format is not known") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a broken PNG is a SyntaxError to Pillow
        raise ValueError(f"'{path}' cannot be read as an image: {error}") from error


def _existing_file(path: str | os.PathLike, kind: str) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"the {kind} '{path}' does not exist")
    if not path.is_file():
        raise ValueError(f"the {kind} '{path}' is not a file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"the {kind} '{path}' cannot be read: permission denied")
    return path


@contextlib.contextmanager
def open_video(path: str | os.PathLike) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a video file and its first video stream, ready to be decoded.

    Raises:
        ValueError: If it holds no video that can be decoded, or is found to be damaged while it is read.
    """
    try:
        with av.open(str(path), metadata_errors="ignore") as container:  # old titles are seldom UTF-8
            if not container.streams.video:
                raise ValueError(f"'{path}' holds no video, only {len(container.streams)} other stream(s)")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(f"'{path}' holds video of a format that PyAV {av.__version__} cannot decode")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.error.FFmpegError as error:
        raise ValueError(f"'{path}' cannot be read as a video: {error.strerror}") from error


class BreaksOffError(Exception):
    """The frames read so far are all that can be had of a damaged or unfinished file."""


def decode_frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yield all intact frames, including those that the decoder still holds when the file breaks off.

    Raises:
        BreaksOffError: After these frames, if the file is damaged or unfinished.
    """
    with contextlib.suppress(av.error.FFmpegError):
        for packet in container.demux(stream):
            if packet.is_corrupt:  # cut short: it might decode, but to a picture that is partly invented
                break
            yield from packet.decode()
        else:
            return
    with contextlib.suppress(av.error.EOFError):  # the error came from the final, flushing call itself
        yield from stream.codec_context.decode(None)
    raise BreaksOffError


def upright(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame's pixels [H, W, 3], rotated as its display matrix says (phones held upright record sideways)."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))  # both count counterclockwise
