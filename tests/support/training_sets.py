"""Training sets that tests write: tiny videos whose frames tell which they are."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from longlive_diffusers.video.writer import VideoWriter


SIDE = 32


def gray_frames(count: int, start: int = 0, *, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Frame k of a video is gray of level 5 (start + k), so that a decoded frame says its number."""
    levels = (5 * (start + np.arange(count)) % 256).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def frame_numbers(pixels) -> list[int]:
    """Of pixels [3, F, H, W] in [-1, 1] which show gray frames."""
    levels = (pixels.mean(dim=(0, 2, 3)) + 1) * 127.5
    return [round(level / 5) for level in levels.tolist()]


def write_video(path: Path, frames: np.ndarray, fps: float = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps, crf=4) as writer:
        writer.write(frames)
    return path


def write_at_times(path: Path, frames: np.ndarray, milliseconds: Sequence[int], title: str = "") -> Path:
    """A video of a variable frame rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream("libx264", rate=1000, options={"crf": "4", "tune": "zerolatency"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(frames, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


CONTAINERS = {
    ".avi": ("avi", "mpeg4", {"b": "8M"}),
    ".flv": ("flv", "flv1", {"b": "8M"}),
    ".m4v": ("mp4", "libx264", {"crf": "4"}),
    ".mkv": ("matroska", "libx264", {"crf": "4"}),
    ".mov": ("mov", "libx264", {"crf": "4"}),
    ".mp4": ("mp4", "libx264", {"crf": "4"}),
    ".mpeg": ("mpeg", "mpeg2video", {"b": "8M"}),
    ".mpg": ("mpeg", "mpeg2video", {"b": "8M"}),
    ".ts": ("mpegts", "libx264", {"crf": "4"}),
    ".webm": ("webm", "libvpx-vp9", {"crf": "4", "b": "0", "deadline": "realtime"}),
    ".wmv": ("asf", "wmv2", {"b": "8M"}),
}
"""The container, codec and options of a video with a suffix."""


def write_in_container(path: Path, frames: np.ndarray) -> Path:
    """A video of 24 frames a second in the container that its suffix stands for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    container_format, codec, options = CONTAINERS[path.suffix]
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def truncate(path: Path) -> None:
    """Cut a video of `write_video` within its last frame."""
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"mdat") + 12])


def write_sound(path: Path) -> Path:
    """A file without pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        samples.rate = 8000
        container.mux(stream.encode(samples))
    return path


def write_captions(root: Path, name: str, captions: Sequence[str | dict], durations: str | None = None) -> None:
    folder = root / "caption" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(captions, start=1):
        content = {"caption": caption} if isinstance(caption, str) else caption
        (folder / f"{number:06d}.json").write_text(json.dumps(content))
    if durations is not None:
        (folder / "shot_durations.txt").write_text(durations)


def write_sample(
    root: Path,
    name: str,
    lengths: Sequence[int],
    captions: Sequence[str | dict] | None = None,
    durations: str | None = None,
) -> None:
    """One clip of so many gray frames for each of `lengths`; the second goes on counting where the first ended."""
    for number, length in enumerate(lengths, start=1):
        write_video(clip_path(root, name, number), gray_frames(length, sum(lengths[: number - 1])))
    write_captions(root, name, captions or [f"shot {number}" for number in range(len(lengths))], durations)


def clip_path(root: Path, name: str, number: int = 1) -> Path:
    return root / "video" / name / f"{number:06d}.mp4"
