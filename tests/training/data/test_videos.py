"""Frames of clips: at the right times, upright, of the right part, or a reason why not."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from data.videos import ClipError, count_frames, read_frames
from tests.support.training_sets import (
    SIDE,
    frame_numbers,
    gray_frames,
    truncate,
    write_at_times,
    write_sound,
    write_video,
)


def read(path, count: int, *, fps=24, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    """[3, count, height, width] in [-1, 1]."""
    frames = torch.stack(list(read_frames(path, Fraction(fps), count, height, width)), dim=1)
    assert frames.dtype == torch.uint8
    return frames / 127.5 - 1


def numbers(path, fps, count: int = 1000) -> list[int]:
    count = count_frames(path, Fraction(fps), count)
    return frame_numbers(read(path, count, fps=fps))


# Videos.


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24, list(range(24))),
        (12, list(range(0, 24, 2))),
        (8, list(range(0, 24, 3))),
        (48, [number // 2 for number in range(48)]),  # half-way between two frames the earlier is taken
    ],
)
def test_a_clip_of_another_rate_gives_its_nearest_frames(tmp_path, fps, expected):
    path = write_video(tmp_path / "clip.mp4", gray_frames(24))
    assert numbers(path, fps) == expected


def test_30_frames_a_second_are_one_second_of_24(tmp_path):
    path = write_video(tmp_path / "clip.mp4", gray_frames(30), fps=30)
    got = numbers(path, 24)
    assert len(got) == 24
    assert all(abs(source / 30 - number / 24) <= 1 / 60 + 1e-9 for number, source in enumerate(got))


def test_ntsc_rates(tmp_path):
    path = write_video(tmp_path / "clip.mp4", gray_frames(24), fps=Fraction(24000, 1001))
    assert numbers(path, Fraction(24000, 1001)) == list(range(24))
    assert numbers(path, 24) == list(range(24))


def test_a_variable_frame_rate(tmp_path):
    path = write_at_times(tmp_path / "clip.mkv", gray_frames(5), [0, 100, 150, 500, 600])
    assert numbers(path, 10) == [0, 1, 2, 2, 3, 3, 4]  # 200 ms is 50 ms after 150; 300 is nearer to 150 than to 500
    path = write_at_times(tmp_path / "late.mkv", gray_frames(3), [1000, 1100, 1200])
    assert numbers(path, 10) == [0, 1, 2]  # times count from the first frame


def test_a_title_that_is_not_utf8(tmp_path):
    path = write_at_times(tmp_path / "clip.mkv", gray_frames(2), [0, 100], title="ABCDEFGH")
    path.write_bytes(path.read_bytes().replace(b"ABCDEFGH", b"\xff\xe4CDEFGH"))
    assert numbers(path, 10) == [0, 1]


def test_a_clip_of_one_frame(tmp_path):
    path = write_video(tmp_path / "clip.mp4", gray_frames(1))
    assert count_frames(path, Fraction(24), 10) == 1


def test_reading_stops_where_enough_is_read(tmp_path):
    path = write_video(tmp_path / "clip.mp4", gray_frames(24))
    assert count_frames(path, Fraction(24), 5) == 5
    assert frame_numbers(read(path, 3)) == [0, 1, 2]
    with pytest.raises(ClipError, match=r"clip.mp4' has 24 frames at 24 a second, but 25 are needed"):
        read(path, 25)


def stripes(count: int = 2, height: int = 32, width: int = 96) -> np.ndarray:
    """Three vertical stripes: red, green, blue."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for channel in range(3):
        frames[:, :, channel * width // 3 : (channel + 1) * width // 3, channel] = 200
    return frames


def channel_means(pixels: torch.Tensor) -> list[float]:
    return ((pixels.mean(dim=(1, 2, 3)) + 1) * 127.5).tolist()


def test_the_center_is_cropped(tmp_path):
    wide = write_video(tmp_path / "wide.mp4", stripes())
    pixels = read(wide, 2, height=16, width=16)
    assert pixels.shape == (3, 2, 16, 16)
    inner = pixels[:, :, 2:-2, 2:-2]
    red, green, blue = channel_means(inner)
    assert red < 10 and blue < 10 and green > 180, "only the middle third is seen"
    pixels = read(wide, 2, height=32, width=96)  # its own size: nothing is resized
    assert channel_means(pixels[..., 4:28])[0] > 180 and channel_means(pixels[..., 68:92])[2] > 180


def test_a_tall_crop_of_a_wide_frame_fills_the_frame(tmp_path):
    path = write_video(tmp_path / "clip.mp4", stripes(height=64, width=64))
    pixels = read(path, 1, height=48, width=16)
    red, green, blue = channel_means(pixels[..., 2:-2])
    assert green > 180 and red < 20 and blue < 20


def test_odd_sizes(tmp_path):
    path = write_video(tmp_path / "clip.mp4", gray_frames(3, height=34, width=58))
    assert read(path, 3, height=17, width=33).shape == (3, 3, 17, 33)
    assert frame_numbers(read(path, 3, height=50, width=20)) == [0, 1, 2]


def test_reduction_is_antialiased(tmp_path):
    board = np.zeros((1, 128, 128, 3), np.uint8)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = 255
    pixels = read(write_video(tmp_path / "clip.mp4", board), 1, height=16, width=16)
    assert pixels[..., 2:-2, 2:-2].std() < 0.1, "a fine checkerboard is gray from afar, not a coarse one"


def test_a_clip_filmed_on_its_side_is_turned_upright(tmp_path):
    path = write_video(tmp_path / "clip.mp4", stripes())
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 36
    struct.pack_into(">9i", data, matrix, 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # a quarter turn clockwise
    path.write_bytes(data)
    pixels = read(path, 2, height=96, width=32)
    assert channel_means(pixels[:, :, 4:28])[0] > 180 and channel_means(pixels[:, :, 68:92])[2] > 180


def test_pixels_that_are_not_square(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 32, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(1, 3)  # 96 narrow pixels: the picture is a square
        for image in stripes(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    pixels = read(path, 1, height=32, width=32)
    assert channel_means(pixels[..., 2:8])[0] > 150 and channel_means(pixels[..., -8:-2])[2] > 150


# Files that are no good.


def test_files_that_cannot_be_read_are_named_with_a_reason(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video at all, but long enough to be looked at")
    (tmp_path / "empty.mp4").touch()
    write_sound(tmp_path / "sound.mp4")
    headless = write_video(tmp_path / "headless.mp4", gray_frames(3))
    data = headless.read_bytes()
    headless.write_bytes(data[: data.index(b"moof") - 4])
    unfinished = write_at_times(tmp_path / "unfinished.mp4", gray_frames(20), range(0, 800, 40))
    unfinished.write_bytes(unfinished.read_bytes()[:-200])  # an ordinary mp4, whose index comes last
    unknown = write_video(tmp_path / "unknown.mp4", gray_frames(3))
    unknown.write_bytes(unknown.read_bytes().replace(b"avc1", b"xyz1"))
    for name, reason in [
        ("text.mp4", "text.mp4' cannot be read as a video"),
        ("empty.mp4", "empty.mp4' cannot be read as a video"),
        ("missing.mp4", "missing.mp4' does not exist"),
        ("sound.mp4", r"sound.mp4' holds no video, only 1 other stream"),
        ("headless.mp4", "none of the frames of '.*headless.mp4' can be decoded"),
        ("unfinished.mp4", "unfinished.mp4' cannot be read as a video"),
        ("unknown.mp4", "unknown.mp4' holds video of a format that PyAV .* cannot decode"),
    ]:
        with pytest.raises(ClipError, match=reason):
            count_frames(tmp_path / name, Fraction(24), 100)


def test_a_truncated_clip_is_good_as_far_as_it_is_not_needed(tmp_path):
    path = write_video(tmp_path / "clip.mp4", gray_frames(20))
    truncate(path)
    assert count_frames(path, Fraction(24), 15) == 15
    with pytest.raises(
        ClipError, match=r"clip.mp4' is damaged or incomplete: it breaks off after 19 of about 20 frames"
    ):
        count_frames(path, Fraction(24), 100)
