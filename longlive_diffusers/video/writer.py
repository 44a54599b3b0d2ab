"""Writing a video while it is being made.

A long video is written as its chunks arrive: memory stays constant, and the file can be watched, and survives, while
the program is still running. An ordinary mp4 does neither, because its index is written last. So the mp4 is
fragmented: the header comes first and empty, and every frame is a fragment of its own with its own piece of index
(about 110 bytes). The encoder keeps nothing back either (x264's zero-latency tuning: no B-frames, no look-ahead). Thus
when `write` returns, all its frames but the last are on the disk, and that one follows with the next frame or at the
end, whatever then becomes of the process. Every chunk begins with a key frame, so a player can start or seek at any.

A video that is there already is not lost to one that may never be finished: the new one is written beside it, and
takes its name at the end. It does so only if that file is still the one that was there when the writer was made: what
another program wrote meanwhile under the same name is not lost either.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import av
import av.codec
import av.container
import av.error
import numpy as np
import torch

from ..atomic_write import check_new_file, is_stream, shortened
from ..number_checks import is_finite
from ..tensor_checks import check_plain
from .h264 import ENCODER, add_h264_stream, as_video_frame


# What makes the container progressive, by suffix: mp4's fragments; Matroska's clusters, a new one for every frame.
CONTAINER_OPTIONS = {
    ".mp4": {"movflags": "frag_every_frame+empty_moov+default_base_moof"},
    ".mov": {"movflags": "frag_every_frame+empty_moov+default_base_moof"},
    ".mkv": {"cluster_time_limit": "0"},
}
LARGEST_DENOMINATOR = 1001  # of a frame rate in use: 23.976 is 24000/1001
# Float pixels are in [0, 1]; what rounding in a half-precision decoder may add beyond that is clipped silently.
RANGE_TOLERANCE = 1e-2


def check_output(path: str | os.PathLike) -> Path:
    """Check, before hours of work, that a video can be written to `path`.

    Returns:
        The path as a `pathlib.Path`. Nothing is created or changed on the disk.

    Raises:
        ValueError: If the suffix is not that of a video this can write, no file can be written there (see
            `atomic_write.check_new_file`), or PyAV was built without the H.264 encoder.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"A video is written to the path of a file, got {path!r}")
    suffix = Path(path).suffix
    if suffix.lower() not in CONTAINER_OPTIONS:
        suffixes = ", ".join(CONTAINER_OPTIONS)
        raise ValueError(f"Cannot write '{path}': its suffix is '{suffix}', but a video's is one of {suffixes}")
    path = check_new_file(path)
    try:
        av.codec.Codec(ENCODER, "w")
    except av.codec.codec.UnknownCodecError as error:
        raise ValueError(
            f"Cannot write '{path}': PyAV {av.__version__} was built without the H.264 encoder '{ENCODER}'. The PyAV "
            "wheels on PyPI have it: pip install --force-reinstall --no-deps av"
        ) from error
    return path


class VideoWriter:
    """Writes frames to an H.264 video (yuv420p, BT.709) as they come, in constant memory.

    The file is created at the first `write`. It is playable at any time from then on, also while it is being written
    and after the process was killed: at most the last frame written is missing.

    Where there is a file already, the video is written to `NAME.unfinished.mp4` beside it, and replaces it when the
    writer is closed; if the `with` block ends with an error, both stay. If another program has written that file
    meanwhile, both stay, too: the video is then `NAME-2.mp4`. If one has removed or replaced what is being written, it
    is written again at the end. `written_to` says where the video is; but if `was_moved`, another program has renamed
    it, and only that one knows.

    Args:
        path: The path of the file to write; ends with .mp4, .mov or .mkv.
        fps: The number of frames per second.
        crf: x264's constant rate factor: 0 is lossless, 18 hardly distinguishable, 51 the worst.

    Raises:
        ValueError: If the file cannot be written (see `check_output`), or `fps` or `crf` is out of range.

    Example:
        >>> with VideoWriter("video.mp4") as writer:
        ...     for chunk in session:
        ...         writer.write(chunk.frames[0])
    """

    def __init__(self, path: str | os.PathLike, fps: float | Fraction = 24, *, crf: int = 18) -> None:
        self.path = check_output(path)
        if not is_finite(fps) or not 1 / LARGEST_DENOMINATOR <= fps <= 1000:
            raise ValueError(f"`fps` must be a number from 1/{LARGEST_DENOMINATOR} to 1000, got {fps!r}")
        if not is_finite(crf) or not 0 <= crf <= 51:
            raise ValueError(f"`crf` must be a number from 0 to 51, got {crf!r}")
        self.fps = Fraction(float(fps)).limit_denominator(LARGEST_DENOMINATOR)  # NumPy's floats are no fractions
        self.crf = crf
        self.written_to = self.path
        self.frames_written = 0
        self._found = _state(self.path)
        self._file: BinaryIO | None = None  # keeps what is written, also where its name is gone
        self._is_kept_beside = False
        self.was_moved = False
        self._size: tuple[int, int] | None = None  # height, width
        self._output: tuple[av.container.OutputContainer, av.VideoStream] | None = None
        self._pipe: BinaryIO | None = None  # keeps a pipe's reader until FFmpeg has opened it, too
        self._closed = False

    def write(self, frames: np.ndarray | torch.Tensor) -> None:
        """Append one chunk of frames.

        Args:
            frames: The frames, [F, H, W, 3], RGB: floating point in [0, 1], or uint8. NumPy, or torch on any device. H
                and W are even and the same for the whole video.

        Raises:
            ValueError: For another shape, size, dtype or range of values, or if the writer is closed; the video is
                then unchanged.
            OSError: If the file cannot be written, such as on a full disk; what is in it still plays.
        """
        if self._closed:
            raise ValueError(f"Cannot write to '{self.path}': the writer is closed after {self.frames_written} frames")
        frames = _as_numpy(frames)
        self._check(frames)
        with self._naming_the_file():
            if self._output is None:
                self._output = self._open(height=frames.shape[1], width=frames.shape[2])
            container, stream = self._output
            for index, frame in enumerate(frames):
                picture = as_video_frame(
                    _as_uint8(frame), index=self.frames_written, fps=self.fps, is_key_frame=index == 0
                )
                container.mux(stream.encode(picture))
                self.frames_written += 1

    @property
    def path_is_taken(self) -> bool:
        """Whether another program has written a file at `path` since this writer was made. Without a meaning where it
        is this writer's own."""
        return _state(self.path) not in (None, self._found)

    def close(self) -> None:
        """Finish the video, and let it replace what had its name, but not what another program wrote meanwhile.

        Closing twice, or before any frame was written (there is no file then), does nothing.

        Raises:
            OSError: If the end of the video cannot be written.
        """
        self._finish()
        if self.written_to == self.path or self._is_kept_beside or self.was_moved:
            return
        target = Path(os.path.realpath(self.path))
        if self.path_is_taken:
            with _create_beside(target) as free:
                target = Path(free.name)
            self._is_kept_beside = True
        os.replace(self.written_to, target)
        self.written_to = target if self._is_kept_beside else self.path

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # the error that is under way says more
            self._finish()  # what was made so far is worth keeping, and so is what it was to replace

    def _finish(self) -> None:
        self._closed = True
        if self._output is None:
            return
        (container, stream), self._output = self._output, None
        with self._naming_the_file(), contextlib.ExitStack() as closing:
            closing.callback(self._release)
            if self._pipe is not None:
                closing.callback(self._pipe.close)
            closing.callback(container.close)
            container.mux(stream.encode(None))

    def _release(self) -> None:
        """Close the file: if its name is gone, what is in it gets another; if nothing is in it, it is removed."""
        if self._file is None:
            return
        with self._file as file:
            self._file, state = None, os.fstat(file.fileno())
            if state.st_nlink == 0 and state.st_size:
                with _create_beside(Path(os.path.realpath(self.path)), ".unfinished") as copy:
                    self.written_to = Path(copy.name)
                    shutil.copyfileobj(file, copy)
                return
            self.was_moved = not _is_at(state, self.written_to)
        if state.st_size == 0 and not self.was_moved:
            self.written_to.unlink()

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Turn FFmpeg's errors into those of the operating system, with the name of the file."""
        try:
            yield
        except av.error.FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(self.written_to)) from error

    def _check(self, frames: np.ndarray) -> None:
        if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(f"frames must be [F, H, W, 3] with at least one frame, but their shape is {frames.shape}")
        height, width = frames.shape[1:3]
        if height % 2 or width % 2:
            raise ValueError(f"H.264 with yuv420p needs an even height and width, but the frames are {height}x{width}")
        if self._size is not None and (height, width) != self._size:
            raise ValueError(
                "all frames of a video have one size (height x width): the first were "
                f"{self._size[0]}x{self._size[1]}, these are {height}x{width}"
            )
        if frames.dtype == np.uint8:
            return
        if not np.issubdtype(frames.dtype, np.floating):
            raise ValueError(f"frames must be floating point in [0, 1] or uint8, but their dtype is {frames.dtype}")
        low, high = float(frames.min()), float(frames.max())
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # written this way, it catches NaN too
            raise ValueError(f"floating point frames must be in [0, 1], but they are in [{low:g}, {high:g}]")

    def _open(self, *, height: int, width: int) -> tuple[av.container.OutputContainer, av.VideoStream]:
        # flush_packets: no frame waits in a buffer of the process, where a kill would lose it.
        options = {"flush_packets": "1", **CONTAINER_OPTIONS[self.path.suffix.lower()]}
        if not is_stream(self.path):
            self._file = self._create()
        if self.path.is_fifo():
            # It waits here, where Ctrl-C can end it, for somebody who reads it; FFmpeg, which opens it with the first
            # frame, then does not wait.
            self._pipe = open(self.path, "wb")  # noqa: SIM115 (closed with the container)
        try:
            # Named as a file: "12:30.mp4" would be taken for a protocol called 12.
            container = av.open(f"file:{self.written_to}", mode="w", options=options)
            stream = add_h264_stream(
                container, height=height, width=width, fps=self.fps, crf=self.crf, preset="medium"
            )
        except BaseException:
            self._release()
            raise
        self._size = (height, width)
        return container, stream

    def _create(self) -> BinaryIO:
        """Create the file that FFmpeg then opens, so that of two programs that begin at once, one has the name."""
        target = Path(os.path.realpath(self.path))
        try:
            return open(target, "x+b")
        except FileExistsError:
            file = _create_beside(target, ".unfinished")
            self.written_to = Path(file.name)
            return file


def _create_beside(path: Path, mark: str = "") -> BinaryIO:
    """Create the first file beside another whose name is free: `NAME-2.mp4`, `NAME-3.mp4`, ..., or with a mark,
    `NAME.mark.mp4`, `NAME.mark-2.mp4`, ..."""
    number = 1 if mark else 2
    while True:
        ending = f"{mark}{'' if number == 1 else f'-{number}'}{path.suffix}"
        number += 1
        with contextlib.suppress(FileExistsError):
            return open(path.with_name(shortened(path.stem, len(os.fsencode(ending))) + ending), "x+b")


def _state(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is written; None where there is none."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    return state.st_size, state.st_mtime_ns


def _is_at(state: os.stat_result, path: Path) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.path.samestat(state, os.stat(path))
    except FileNotFoundError:
        return False


def _as_numpy(frames: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(frames, torch.Tensor):
        check_plain("frames", frames)
        frames = frames.detach().cpu()
        # NumPy has neither bfloat16 nor the floats of 8 bits.
        return (frames.float() if frames.is_floating_point() and frames.dtype != torch.float64 else frames).numpy()
    try:
        return np.asarray(frames)
    except ValueError as error:
        raise ValueError(f"frames must be [F, H, W, 3], an array or a tensor: {error}") from error


def _as_uint8(frame: np.ndarray) -> np.ndarray:
    """Convert one frame [H, W, 3] to 8-bit pixels in one block of memory."""
    if frame.dtype != np.uint8:
        frame = np.rint(frame.astype(np.float32).clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(frame)
