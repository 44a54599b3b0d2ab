"""A video can be watched while it is written, and outlives the process that writes it."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from longlive_diffusers.video.reader import read_video
from longlive_diffusers.video.writer import VideoWriter, check_output
from tests.support.held_memory import held_bytes
from tests.support.processes import environment


SUFFIXES = (".mp4", ".mov", ".mkv")


def numbered_frames(start: int, count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Grey ramps, each frame shifted on from the last: [count, height, width, 3], float in [0, 1]."""
    ramp = np.sin(np.linspace(0, 2 * np.pi, width, endpoint=False)) / 2 + 0.5
    rows = np.stack([np.roll(ramp, 3 * (start + index)) for index in range(count)])
    return np.broadcast_to(rows[:, None, :, None], (count, height, width, 3))


def decode(path: Path) -> tuple[list[float], list[np.ndarray]]:
    """Times in seconds and pixels of every frame that can be read, up to the first damage."""
    times, frames = [], []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                times.append(float(frame.pts * frame.time_base))
                frames.append(frame.to_ndarray(format="rgb24"))
    except av.error.FFmpegError:
        pass
    return times, frames


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_frames_sizes_times_and_rate_come_back(tmp_path, suffix):
    path = tmp_path / f"video{suffix}"
    chunks = [numbered_frames(0, 5), numbered_frames(5, 8), numbered_frames(13, 1)]
    with VideoWriter(path, fps=16) as writer:
        for chunk in chunks:
            writer.write(chunk)
    assert writer.frames_written == 14

    frames, fps = read_video(path)
    expected = np.rint(np.concatenate(chunks) * 255)
    assert frames.shape == (14, 64, 96, 3) and frames.dtype == np.uint8
    assert fps == 16
    assert np.abs(frames - expected).mean() < 2
    assert decode(path)[0] == pytest.approx([index / 16 for index in range(14)], abs=1e-3)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        key_frames = [index for index, frame in enumerate(container.decode(stream)) if frame.key_frame]
    assert key_frames == [0, 5, 13]  # every chunk can be seeked to


@pytest.mark.parametrize("color", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0), (0.5, 0.25, 0.75)])
def test_colors_come_back(tmp_path, color):
    with VideoWriter(tmp_path / "video.mp4") as writer:
        writer.write(np.broadcast_to(np.array(color, np.float32), (2, 32, 32, 3)))
    frames, _ = read_video(tmp_path / "video.mp4")
    assert np.abs(frames.astype(float) - np.array(color) * 255).max() <= 3


@pytest.mark.parametrize("kind", ["float64", "float16", "uint8", "torch.float32", "torch.bfloat16", "torch.uint8"])
def test_every_kind_of_frames_gives_the_same_video(tmp_path, kind):
    levels = np.linspace(0, 255, 32).round()  # 8-bit levels, which every kind but the half precisions holds exactly
    frames = np.broadcast_to(levels[None, None, :, None], (3, 32, 32, 3))
    frames = frames if kind.endswith("uint8") else frames / 255
    if kind.startswith("torch."):
        frames = torch.tensor(frames.copy()).to(getattr(torch, kind.removeprefix("torch.")))
    else:
        frames = frames.astype(kind)
    with VideoWriter(tmp_path / "video.mp4") as writer:
        writer.write(frames)
    assert np.abs(read_video(tmp_path / "video.mp4")[0] - levels[None, None, :, None]).max() <= 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_after_each_write_all_its_frames_but_one_are_on_the_disk(tmp_path, suffix):
    path = tmp_path / f"video{suffix}"
    with VideoWriter(path) as writer:
        for index in range(4):
            writer.write(numbered_frames(8 * index, 8))
            times, frames = decode(path)
            assert len(frames) >= 8 * (index + 1) - 1
            assert times == pytest.approx([index / 24 for index in range(len(times))], abs=1e-3)
            assert np.abs(frames[-1] - numbered_frames(len(frames) - 1, 1)[0] * 255).mean() < 2


WRITE_FOREVER = """
import itertools, sys
import numpy as np
from longlive_diffusers.video.writer import VideoWriter

with VideoWriter(sys.argv[1], fps=12) as writer:
    for index in itertools.count():
        writer.write(np.random.default_rng(index).random((8, 64, 96, 3)))
        print(index, flush=True)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_killed_process_leaves_a_playable_video(tmp_path, suffix):
    path = tmp_path / f"video{suffix}"
    command = [sys.executable, "-c", WRITE_FOREVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            written = [int(process.stdout.readline()) for _ in range(5)]
        finally:
            process.kill()  # SIGKILL: no handler, no finally, no trailer
        written += [int(line) for line in process.stdout]
    frames_in_finished_writes = 8 * len(written)

    times, frames = decode(path)
    assert len(frames) >= frames_in_finished_writes - 1
    assert times == pytest.approx([index / 12 for index in range(len(times))], abs=1e-3)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 12


def boxes(data: bytes) -> list[tuple[bytes, int, int]]:
    """The top-level boxes of an mp4: kind, start, end."""
    found, start = [], 0
    while start < len(data):
        end = start + int.from_bytes(data[start : start + 4], "big")
        found.append((data[start + 4 : start + 8], start, end))
        start = end
    return found


def test_a_file_cut_within_a_frame_keeps_every_frame_before_it(tmp_path):
    """A frame reaches the disk as one `write` of its index and (the beginning of) its data, then the rest of its data.

    So these are the places where a file can end. What was written before the cut is neither lost nor altered.
    """
    path, cut = tmp_path / "video.mp4", tmp_path / "cut.mp4"
    with VideoWriter(path) as writer:
        for index in range(3):
            writer.write(numbered_frames(8 * index, 8))
    data, (_, whole) = path.read_bytes(), decode(path)
    assert len(whole) == 24
    data_boxes = [(start, end) for kind, start, end in boxes(data) if kind == b"mdat"]
    assert len(data_boxes) == 24
    for count, (start, end) in enumerate(data_boxes):
        for size in range(start, end, 41):
            cut.write_bytes(data[:size])
            _, frames = decode(cut)
            assert len(frames) == count
            assert all(np.array_equal(frame, full) for frame, full in zip(frames, whole, strict=False))


def test_an_error_in_the_loop_leaves_a_finished_video(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "video.mp4") as writer:
        writer.write(numbered_frames(0, 8))
        raise KeyboardInterrupt
    assert len(read_video(tmp_path / "video.mp4")[0]) == 8


def test_memory_does_not_grow_with_the_length_of_the_video(tmp_path):
    chunk = np.random.default_rng(0).random((8, 128, 128, 3), np.float32)
    with VideoWriter(tmp_path / "video.mp4") as writer:
        for _ in range(10):
            writer.write(chunk)
        before = held_bytes()
        for _ in range(60):  # 94 MB of frames as float, 24 MB as 8-bit
            writer.write(chunk)
        assert held_bytes() - before < 12e6


NAMES = ("12:30", "C:x", "http:x", "a\nb", "-x", "%d", "~nobody", "file:x", ".", "\udcff", "é", "x" * 251)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_file_is_the_name_of_a_video(tmp_path, name):
    path = tmp_path / f"{name}.mp4"
    for frames in (1, 2):  # a new file, and one that is replaced
        with VideoWriter(path) as writer:
            writer.write(numbered_frames(0, frames, 32, 32))
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        (tmp_path / "plain.mp4").write_bytes(path.read_bytes())
        assert len(read_video(tmp_path / "plain.mp4")[0]) == frames
        (tmp_path / "plain.mp4").unlink()


def test_a_video_that_is_there_stays_until_the_new_one_is_finished(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    with VideoWriter(path) as writer:
        writer.write(numbered_frames(0, 8))
        assert path.read_bytes() == b"old"
        assert writer.written_to == tmp_path / "video.unfinished.mp4"
        assert len(decode(writer.written_to)[1]) >= 7  # it can be watched meanwhile
    assert writer.written_to == path
    assert len(read_video(path)[0]) == 8
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_both_videos_are_there(tmp_path, error):
    path = tmp_path / "video.mkv"
    path.write_bytes(b"old")
    for name in ("video.unfinished.mkv", "video.unfinished-2.mkv"):
        with pytest.raises(error), VideoWriter(path) as writer:
            writer.write(numbered_frames(0, 3))
            raise error
        assert writer.written_to == tmp_path / name
        assert len(read_video(tmp_path / name)[0]) == 3
    assert path.read_bytes() == b"old"


# Other programs that write, remove or move the same file.


def frame_counts(folder: Path) -> dict[str, int]:
    """The number of frames of every file in a folder, by its name; all of them have to be whole videos."""
    return {path.name: len(read_video(path)[0]) for path in folder.iterdir()}


@pytest.mark.parametrize("there_before", [False, True])
def test_two_writers_of_one_file_lose_nothing(tmp_path, there_before):
    path = tmp_path / "video.mp4"
    if there_before:
        path.write_bytes(b"old")
    first, second = VideoWriter(path), VideoWriter(path)
    first.write(numbered_frames(0, 8))
    second.write(numbered_frames(0, 4))
    for writer in (first, second) if there_before else (second, first):
        writer.close()
        writer.close()
    assert (first.written_to, second.written_to) == (path, tmp_path / "video-2.mp4")
    assert frame_counts(tmp_path) == {"video.mp4": 8, "video-2.mp4": 4}


def test_a_video_that_is_still_being_written_is_not_replaced(tmp_path):
    first = VideoWriter(tmp_path / "video.mp4")
    first.write(numbered_frames(0, 2))
    (tmp_path / "video-2.mp4").write_bytes((tmp_path / "video.mp4").read_bytes())
    with VideoWriter(tmp_path / "video.mp4") as second:
        second.write(numbered_frames(0, 4))
        first.write(numbered_frames(2, 6))
    assert second.written_to == tmp_path / "video-3.mp4" and second.path_is_taken
    assert len(decode(first.written_to)[1]) >= 7
    first.close()
    assert first.written_to == tmp_path / "video.mp4"
    (tmp_path / "video-2.mp4").unlink()
    assert frame_counts(tmp_path) == {"video.mp4": 8, "video-3.mp4": 4}


def test_a_file_that_was_removed_or_replaced_is_written_again(tmp_path):
    path = tmp_path / "video.mp4"
    for other in (None, b"another program's"):
        with VideoWriter(path) as writer:
            writer.write(numbered_frames(0, 8))
            path.unlink()
            if other is not None:
                path.write_bytes(other)
        assert writer.written_to == (path if other is None else tmp_path / "video-2.mp4")
        assert len(read_video(writer.written_to)[0]) == 8
        writer.written_to.unlink()
    assert path.read_bytes() == b"another program's" and list(tmp_path.iterdir()) == [path]


def test_after_an_error_a_file_that_was_replaced_is_there_and_unfinished(tmp_path):
    path = tmp_path / "video.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path) as writer:
        writer.write(numbered_frames(0, 8))
        (tmp_path / "other").write_bytes(b"another program's")
        os.replace(tmp_path / "other", path)
        raise KeyboardInterrupt
    assert writer.written_to == tmp_path / "video.unfinished.mp4" and writer.path_is_taken
    assert len(read_video(writer.written_to)[0]) == 8 and path.read_bytes() == b"another program's"


@pytest.mark.parametrize("there_before", [False, True])
def test_a_file_that_was_moved_is_where_it_was_moved_to(tmp_path, there_before):
    path = tmp_path / "video.mp4"
    if there_before:
        path.write_bytes(b"old")
    with VideoWriter(path) as writer:
        writer.write(numbered_frames(0, 2))
        writer.written_to.rename(tmp_path / "mine.mp4")
        writer.write(numbered_frames(2, 6))
    assert writer.was_moved
    assert len(read_video(tmp_path / "mine.mp4")[0]) == 8
    assert [file.read_bytes() for file in tmp_path.glob("video*")] == [b"old"] * there_before


def test_frames_that_cannot_be_encoded_leave_no_file(tmp_path):
    with pytest.raises(OSError, match=r"video\.mp4"), VideoWriter(tmp_path / "video.mp4") as writer:
        writer.write(np.zeros((1, 2, 20_000, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old.mp4", "new.mp4"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there" / "old.mp4").write_bytes(b"old")
    for name in ("old.mp4", "new.mp4"):
        with VideoWriter(tmp_path / name) as writer:
            writer.write(numbered_frames(0, 2))
        assert (tmp_path / name).is_symlink()
        assert len(read_video(tmp_path / "there" / name)[0]) == 2
    assert len(list((tmp_path / "there").iterdir())) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_with_the_file(tmp_path):
    (tmp_path / "video.mp4").symlink_to("/dev/full")
    full = pytest.raises(OSError, match=r"No space left on device: '.*video.mp4'")
    with full as error, VideoWriter(tmp_path / "video.mp4") as writer:
        writer.write(numbered_frames(0, 2))
    assert error.value.errno == 28 and error.value.filename == str(tmp_path / "video.mp4")


def test_no_file_before_the_first_frame(tmp_path):
    (tmp_path / "old.mp4").write_bytes(b"kept until there is something to put in its place")
    for name in ("new.mp4", "old.mp4"):
        with VideoWriter(tmp_path / name):
            pass
    assert not (tmp_path / "new.mp4").exists()
    assert (tmp_path / "old.mp4").stat().st_size == 49
    with VideoWriter(tmp_path / "old.mp4") as writer:
        writer.write(numbered_frames(0, 2))
    assert len(read_video(tmp_path / "old.mp4")[0]) == 2


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((4, 64, 96)), r"\[F, H, W, 3\].*\(4, 64, 96\)"),
        (np.zeros((4, 3, 64, 96)), r"\[F, H, W, 3\].*\(4, 3, 64, 96\)"),
        (np.zeros((0, 64, 96, 3)), r"at least one frame.*\(0, 64, 96, 3\)"),
        (np.zeros((1, 63, 96, 3)), "even height and width.*63x96"),
        (np.zeros((1, 64, 97, 3)), "even height and width.*64x97"),
        (np.zeros((1, 64, 96, 3), np.int64), "uint8.*int64"),
        (np.full((1, 64, 96, 3), 255.0), r"in \[0, 1\].*\[255, 255\]"),
        (np.full((1, 64, 96, 3), -1.0), r"in \[0, 1\].*\[-1, -1\]"),
        (np.full((1, 64, 96, 3), np.nan), r"in \[0, 1\].*nan"),
        (np.zeros((1, 32, 96, 3)), "the first were 64x96.*these are 32x96"),
        ([np.zeros((64, 96, 3)), np.zeros((96, 64, 3))], "an array or a tensor: .*inhomogeneous"),
        (None, r"\[F, H, W, 3\]"),
    ],
)
def test_wrong_frames_are_refused_and_the_video_goes_on(tmp_path, frames, message):
    with VideoWriter(tmp_path / "video.mp4") as writer:
        writer.write(numbered_frames(0, 4))
        with pytest.raises(ValueError, match=message):
            writer.write(frames)
        writer.write(numbered_frames(4, 4))
    assert len(read_video(tmp_path / "video.mp4")[0]) == 8
    with pytest.raises(ValueError, match="closed after 8 frames"):
        writer.write(numbered_frames(8, 4))


def test_frame_rates(tmp_path):
    with VideoWriter(tmp_path / "video.mp4", fps=30000 / 1001) as writer:
        writer.write(numbered_frames(0, 8))
    assert writer.fps == Fraction(30000, 1001)
    assert read_video(tmp_path / "video.mp4")[1] == pytest.approx(30000 / 1001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"fps": fps}, f"`fps` must be a number from 1/1001 to 1000, got {fps!r}")
            for fps in (0, -24, 1e6, float("nan"), float("inf"), 1e-9, 10**400, "24", None, True, 1j, [24])
        ),
        *(
            ({"crf": crf}, f"`crf` must be a number from 0 to 51, got {crf!r}")
            for crf in (52, -1, float("nan"), "18", None, True)
        ),
        *(
            ({"path": path}, f"A video is written to the path of a file, got {path!r}")
            for path in (None, 7, b"video.mp4", ["video.mp4"])
        ),
        ({"path": "a\0b.mp4"}, "Cannot write 'a\\x00b.mp4': no file can have a null character in its name"),
        ({"path": "a.mp4\0"}, "its suffix is"),
    ],
)
def test_arguments_of_another_kind_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        VideoWriter(**{"path": "video.mp4", **arguments})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), np.float32(24), np.int64(30), 1 / 1001, 1000])
def test_every_number_is_a_rate(tmp_path, fps):
    assert VideoWriter(tmp_path / "video.mp4", fps=fps, crf=18.5).fps == Fraction(float(fps)).limit_denominator(1001)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
def test_a_pipe_is_written_to_while_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with ThreadPoolExecutor() as pool, VideoWriter(tmp_path / "pipe.mp4") as writer:
        data = pool.submit((tmp_path / "pipe.mp4").read_bytes)
        writer.write(numbered_frames(0, 3))
        writer.close()
        (tmp_path / "video.mp4").write_bytes(data.result())
    assert len(read_video(tmp_path / "video.mp4")[0]) == 3


def test_check_output_refuses_early(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    for name, message in [
        ("video.gif", r"'\.gif'.*\.mp4, \.mov, \.mkv"),
        ("video", "suffix is ''"),
        ("folder.mp4", "is a folder"),
        ("missing/video.mp4", "missing' does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            VideoWriter(tmp_path / name)
    assert check_output(str(tmp_path / "video.MP4")) == tmp_path / "video.MP4"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.mp4"]


def test_a_build_without_the_encoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("longlive_diffusers.video.writer.ENCODER", "libx264_left_out")
    with pytest.raises(ValueError, match=r"'libx264_left_out'.*pip install"):
        check_output(tmp_path / "video.mp4")
