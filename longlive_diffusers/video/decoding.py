"""Decode a video file: its frames, each with the time at which it is shown, as far as the file is sound."""

import contextlib
import itertools
import os
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.error
from av.stream import Disposition

from ..wording import counted
from .input_file import existing_file


# Containers whose header says how long the file lasts. Of others, FFmpeg makes an estimate from what is there.
STATES_DURATION = ("matroska", "mov", "avi", "flv", "asf")
MOST_OBLONG = 16  # A pixel more oblong than that is damage, and taken for a square one.
LONGEST_GAP = 600  # seconds between two frames; more than that is a damaged clock, not a slow show of pictures


class BreaksOffError(ValueError):
    """
    The frames read so far are all that can be had of a damaged or unfinished file. The message says all of this.

    Args:
        path: The path of the file.
        frames_read: The number of frames that could be read.
        frames_expected: About how many frames the whole file would have; None if it does not say.
    """

    def __init__(self, path: Path, frames_read: int, frames_expected: int | None) -> None:
        of = "" if frames_expected is None else f" of about {frames_expected}"
        super().__init__(f"'{path}' is damaged or incomplete: it breaks off after {frames_read}{of} frames")
        self.frames_read, self.frames_expected = frames_read, frames_expected


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame, as it is stored, and the time when it is shown, in seconds."""

    picture: av.VideoFrame
    time: Fraction


@dataclass(frozen=True)
class Video:
    """
    A video file that is open. `display.Display` turns its frames into what a player shows.

    Args:
        frames: All frames; they can be iterated once, and raise [`BreaksOffError`] where the file does.
        height, width: The size of the frames as they are stored.
        pixel_aspect: The width of a stored pixel, in units of its height.
        display_matrix: The first five numbers (a, b, u, c, d) of the matrix that turns the frames upright, or None.
        stated_rate: The frames per second that the file states, which may be far from the truth; None if it does not.
    """

    frames: Iterator[TimedFrame]
    height: int
    width: int
    pixel_aspect: Fraction
    display_matrix: tuple[int, ...] | None
    stated_rate: Fraction | None


@contextlib.contextmanager
def open_video(path: str | os.PathLike) -> Iterator[Video]:
    """Open a video file.

    Raises:
        ValueError: If there is no such file, it holds no video that can be decoded, or it is found to be damaged while
            it is read.
    """
    path = existing_file(path, "video")
    try:
        # An absolute path is never taken for a protocol (12:30.mp4); old titles are seldom UTF-8.
        with av.open(os.path.abspath(path), metadata_errors="ignore") as container:
            stream = _video_stream(path, container)
            frames = _timed_frames(path, container, stream)
            try:
                first = next(frames, None)
            except BreaksOffError:
                first = None
            if first is None:
                raise ValueError(f"none of the frames of '{path}' can be decoded")
            with contextlib.closing(frames):
                yield Video(
                    itertools.chain([first], frames),
                    first.picture.height,
                    first.picture.width,
                    _pixel_aspect(stream),
                    _display_matrix(first.picture),
                    stream.average_rate or stream.guessed_rate or None,
                )
    except av.error.FFmpegError as error:
        raise ValueError(f"'{path}' cannot be read as a video: {error.strerror}") from error


def _video_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        raise ValueError(f"'{path}' is a still picture, not a video")
    # The cover of an album is a picture among the streams of a sound file.
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        others = len(container.streams)
        only = f", only {counted(others, 'other stream')}" if others else ""
        raise ValueError(f"'{path}' holds no video{only}")
    stream = streams[0]
    if stream.codec_context is None:
        raise ValueError(f"'{path}' holds video of a format that PyAV {av.__version__} cannot decode")
    stream.thread_type = "AUTO"
    return stream


def _pixel_aspect(stream: av.VideoStream) -> Fraction:
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return aspect if Fraction(1, MOST_OBLONG) <= aspect <= MOST_OBLONG else Fraction(1)


def _display_matrix(picture: av.VideoFrame) -> tuple[int, ...] | None:
    # Once for a video: PyAV ties a frame and its side data into a circle, which stays until garbage is collected.
    try:
        matrix = picture.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV names only some kinds of side data, and shows none if there is another
        return None
    return None if matrix is None else struct.unpack_from("=5i", matrix)


def _timed_frames(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> Generator[TimedFrame]:
    """Yield every intact frame; raise a BreaksOffError after them unless they are all that the file should have."""
    rate = stream.average_rate or stream.guessed_rate
    length = _Length(container)
    num_frames, first_time, last_time = 0, Fraction(0), Fraction(0)
    for picture in _pictures(container, stream, length):
        time = last_time
        if picture.pts is not None:
            # Delayed frames have no time base.
            time = picture.pts * (picture.time_base or stream.time_base or Fraction(1, av.time_base))
        elif not rate:
            raise ValueError(f"'{path}' says neither its frame rate nor the times of its frames")
        elif num_frames:
            time += 1 / rate
        if not num_frames:
            first_time = time
        elif time - last_time > LONGEST_GAP:
            length.breaks_off = True
            break
        yield TimedFrame(picture, time)
        num_frames, last_time = num_frames + 1, time
    if length.is_complete:
        return
    expected = stream.frames
    if not expected and length.stated is not None and num_frames > 1 and last_time > first_time:
        frame_rate = (num_frames - 1) / (last_time - first_time)
        expected = num_frames - 1 + round((length.stated - last_time) * frame_rate)
    raise BreaksOffError(path, num_frames, expected if expected > num_frames else None)


class _Length:
    """How long a file says that it lasts, and how far its packets go.

    A file that was cut where a packet ends looks like a shorter one; only its length tells.
    """

    def __init__(self, container: av.container.InputContainer) -> None:
        says_so = container.duration is not None and container.format.name.startswith(STATES_DURATION)
        self.stated = Fraction(container.duration or 0, av.time_base) if says_so else None
        self.breaks_off = False
        self._end = Fraction(0)
        self._longest = Fraction(0)  # of all packets

    def add(self, packet: av.Packet) -> None:
        """Count a packet of any stream: sound may outlast the pictures."""
        if packet.pts is None or packet.time_base is None:
            return
        duration = (packet.duration or 0) * packet.time_base
        end = packet.pts * packet.time_base + duration
        self._longest = max(self._longest, duration or end - self._end)
        self._end = max(self._end, end)

    @property
    def is_complete(self) -> bool:
        """Whether nothing of the file is missing, so far as it can be known: encoders count the length of a packet
        more or less."""
        if self.breaks_off:
            return False
        return self.stated is None or self._end + self._longest + Fraction(1, 10) >= self.stated


def _pictures(
    container: av.container.InputContainer, stream: av.VideoStream, length: _Length
) -> Iterator[av.VideoFrame]:
    """Yield all intact frames, including those that the decoder still holds when the file breaks off.

    A frame that the decoder had to make up in part ends them: all later ones may build on it.
    """
    with contextlib.suppress(av.error.FFmpegError):
        for packet in container.demux():
            if packet.is_corrupt:  # cut short: it might decode, but to a picture that is partly invented
                break
            length.add(packet)
            for picture in packet.decode() if packet.stream.index == stream.index else ():
                assert isinstance(picture, av.VideoFrame)  # of a video stream
                if picture.is_corrupt:
                    length.breaks_off = True
                    return
                yield picture
        else:
            return
    length.breaks_off = True
    with contextlib.suppress(av.error.EOFError):  # the error came from the final, flushing call itself
        yield from itertools.takewhile(lambda picture: not picture.is_corrupt, stream.codec_context.decode(None))
