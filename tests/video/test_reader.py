"""What a user hands in as a video is read as a player shows it, or refused with a reason."""

import io
import os
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from longlive_diffusers.video.decoding import BreaksOffError, open_video
from longlive_diffusers.video.reader import read_video, sampled_frames
from longlive_diffusers.video.writer import VideoWriter
from tests.support.video_files import ORIENTATIONS, encode_video, orient, oriented


@pytest.fixture
def video(tmp_path):
    """24 frames of 32x64, the left half white."""
    frames = np.zeros((24, 32, 64, 3), np.uint8)
    frames[:, :, :32] = 255
    with VideoWriter(tmp_path / "video.mp4") as writer:
        writer.write(frames)
    return tmp_path / "video.mp4"


def gray(count: int, height: int = 32, width: int = 64) -> np.ndarray:
    """Frame k is gray of level 5 k."""
    return np.broadcast_to((5 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def numbers(frames) -> list[int]:
    return [round(float(np.mean(frame)) / 5) for frame in frames]


def quarters(height: int = 32, width: int = 64) -> np.ndarray:
    """A picture whose four quarters are black, red, green and blue, so that every orientation is another."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, width // 2 :, 0] = 220
    picture[height // 2 :, : width // 2, 1] = 220
    picture[height // 2 :, width // 2 :, 2] = 220
    return picture


def is_near(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether pictures agree up to the blur of a codec at the borders between colors."""
    difference = np.abs(found.astype(int) - expected).max(axis=-1)
    return found.shape == expected.shape and float((difference > 24).mean()) < 0.25


@pytest.mark.parametrize(("max_frames", "count"), [(None, 24), (1, 1), (7, 7), (100, 24)])
def test_max_frames(video, max_frames, count):
    frames, fps = read_video(str(video), max_frames=max_frames)
    assert frames.shape == (count, 32, 64, 3)
    assert fps == 24
    with pytest.raises(ValueError, match="`max_frames` must be an integer of at least 1, got 0"):
        read_video(video, max_frames=0)


# Times.


def test_a_browsers_recording_states_a_thousand_frames_a_second(tmp_path):
    """Its frames come about every 33 ms, when they happen to come."""
    times = np.cumsum([0] + [30 + (7 * index) % 9 for index in range(29)]).tolist()
    path = encode_video(tmp_path / "screen.webm", gray(30), milliseconds=times, codec="libvpx")
    with open_video(path) as video:
        assert video.stated_rate == 1000
        frames = list(sampled_frames(video, Fraction(24), 32, 64))
    wanted = [min(range(30), key=lambda k: abs(times[k] - 1000 * n / 24)) for n in range(len(frames))]
    assert len(frames) == pytest.approx(24 * (times[-1] + 33) / 1000, abs=1)
    assert numbers(frames) == wanted
    assert read_video(path)[1] == pytest.approx(1000 * 29 / times[-1], rel=0.01)


def test_frames_are_shown_for_as_long_as_the_file_says(tmp_path):
    path = encode_video(tmp_path / "slides.mkv", gray(4), milliseconds=[0, 500, 1500, 1600])
    with open_video(path) as video:
        assert numbers(sampled_frames(video, Fraction(10), 32, 64)) == [0] * 3 + [1] * 8 + [2] * 5 + [3]
    with open_video(path) as video:
        assert numbers(sampled_frames(video, Fraction(10), 32, 64, limit=5)) == [0] * 3 + [1] * 2


def test_a_clock_that_jumps_is_damage_and_not_a_thousand_hours_of_a_still(tmp_path):
    path = encode_video(tmp_path / "jump.mkv", gray(4), milliseconds=[0, 40, 80, 700_000])
    with open_video(path) as video, pytest.raises(BreaksOffError, match="it breaks off after 3 of about"):
        list(sampled_frames(video, Fraction(24), 32, 64))


# Shapes and orientations.


@pytest.mark.parametrize("matrix", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_every_display_matrix(tmp_path, matrix):
    path = orient(encode_video(tmp_path / "video.mp4", quarters()[None]), matrix)
    expected = oriented(quarters(), matrix)
    assert is_near(read_video(path)[0][0], expected)
    with open_video(path) as video:
        (frame,) = sampled_frames(video, Fraction(24), *expected.shape[:2])
    assert is_near(frame, expected)


@pytest.mark.parametrize(
    ("matrix", "size"), [((0, 0, 0, 0), (32, 64)), ((3, 1, -1, 3), (32, 64)), ((1, 3, -3, 1), (64, 32))]
)
def test_a_matrix_that_is_no_quarter_turn_is_taken_for_the_nearest(tmp_path, matrix, size):
    path = orient(encode_video(tmp_path / "video.mp4", quarters()[None]), matrix)
    assert read_video(path)[0].shape == (1, *size, 3)


@pytest.mark.parametrize(
    ("aspect", "matrix", "size"),
    [
        (Fraction(2), "upright", (32, 128)),
        (Fraction(1, 2), "upright", (32, 32)),
        (Fraction(16, 11), "upright", (32, 93)),
        (Fraction(2), "a quarter turn", (64, 16)),
        (Fraction(1000), "upright", (32, 64)),  # nonsense
    ],
)
def test_pixels_that_are_not_square(tmp_path, aspect, matrix, size):
    path = encode_video(tmp_path / "video.mp4", quarters()[None], pixel_aspect=aspect)
    path = orient(path, ORIENTATIONS[matrix])
    frame = read_video(path)[0][0]
    picture = Image.fromarray(oriented(quarters(), ORIENTATIONS[matrix]))
    assert is_near(frame, np.array(picture.resize((size[1], size[0]), Image.Resampling.NEAREST)))


def test_a_size_that_changes_on_the_way(tmp_path):
    """Of two recordings, one after the other in a bare stream."""
    first, second = (
        encode_video(tmp_path / name, gray(6, height, width)).read_bytes()
        for name, height, width in (("a.h264", 32, 64), ("b.h264", 64, 32))
    )
    (tmp_path / "both.h264").write_bytes(first + second)
    frames, _ = read_video(tmp_path / "both.h264")
    assert frames.shape == (12, 32, 64, 3)
    assert numbers(frames) == [*range(6), *range(6)]


# Colors.


@pytest.mark.parametrize(("height", "width", "matrix"), [(720, 64, 1), (64, 1280, 1), (576, 64, 5)])
def test_high_definition_is_bt709_unless_the_file_says_otherwise(tmp_path, height, width, matrix):
    color = np.full((1, height, width, 3), (200, 40, 60), np.uint8)
    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        frame = av.VideoFrame.from_ndarray(color[0], format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709" if matrix == 1 else "ITU601")
        frame.colorspace = 2  # nothing is said
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(read_video(tmp_path / "video.mp4")[0].astype(int) - color).max() <= 4


def test_transparent_animations_are_laid_over_white(tmp_path):
    pictures = []
    for shade in (50, 100, 150):
        picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        picture.paste((shade, 0, 0, 255), (0, 0, 16, 32))
        pictures.append(picture)
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    frames, _ = read_video(tmp_path / "a.gif")
    assert len(frames) == 3
    assert frames[0, 16, 8].tolist() == [50, 0, 0] and frames[0, 16, 24].tolist() == [255, 255, 255]
    pixels = np.stack([np.array(picture) for picture in pictures])
    encode_video(tmp_path / "a.mov", pixels, codec="png", pixel_format="rgba")
    frame = read_video(tmp_path / "a.mov")[0][2]
    assert frame[16, 8].tolist() == [150, 0, 0] and frame[16, 24].tolist() == [255, 255, 255]


def test_pictures_of_a_camera_with_data_that_pyav_does_not_know(tmp_path):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x010F] = "a camera"
    Image.fromarray(quarters()).save(file, "JPEG", exif=exif, quality=95)
    with av.open(str(tmp_path / "camera.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuvj420p"
        for index in range(3):
            packet = av.Packet(file.getvalue())
            packet.pts = packet.dts = index
            packet.time_base, packet.stream = Fraction(1, 24), stream
            container.mux(packet)
    frames, _ = read_video(tmp_path / "camera.avi")
    assert len(frames) == 3 and is_near(frames[2], quarters())


# Damage.


def test_a_video_that_breaks_off_is_read_as_far_as_it_goes(video):
    data = video.read_bytes()
    video.write_bytes(data[: data.rindex(b"mdat") + 12])  # within the data of the last of 24 frames
    with pytest.warns(UserWarning, match="incomplete: it breaks off after 23 of about 24 frames"):
        frames, fps = read_video(video)
    assert frames.shape == (23, 32, 64, 3)
    assert fps == 24


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.mp4", "a.mov", "a.avi", "a.flv", "sound.mp4"])
def test_a_file_of_which_the_end_is_missing_says_how_much_there_was(tmp_path, name):
    path = encode_video(
        tmp_path / name,
        np.random.default_rng(0).integers(0, 255, (48, 64, 64, 3), np.uint8),  # noise: all frames take much space
        codec="libvpx" if name.endswith("webm") else "libx264",
        options={"movflags": "faststart"} if name.endswith(("mp4", "mov")) else None,
        sound_seconds=2 if name == "sound.mp4" else 0,
    )
    assert len(read_video(path)[0]) == 48  # and no warning
    data = path.read_bytes()
    for part in (0.5, 0.8):
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(BreaksOffError) as caught, open_video(path) as video:
            for _ in sampled_frames(video, Fraction(24), 16, 16):
                pass
        assert caught.value.frames_read == pytest.approx(48 * part, abs=8)
        assert caught.value.frames_expected == pytest.approx(48, abs=2)
        assert f"after {caught.value.frames_read} of about {caught.value.frames_expected} frames" in str(caught.value)


@pytest.mark.parametrize("sound_seconds", [1.0, 5.0])
def test_sound_of_another_length_is_no_damage(tmp_path, sound_seconds, recwarn):
    path = encode_video(tmp_path / "a.mkv", gray(48), sound_seconds=sound_seconds)
    assert len(read_video(path)[0]) == 48
    assert not recwarn.list


def test_a_frame_that_the_decoder_made_up_is_not_shown(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), np.uint8)
    path = encode_video(tmp_path / "a.mp4", frames, options={"movflags": "faststart"})
    whole, data = read_video(path)[0], bytearray(path.read_bytes())
    start = data.index(b"mdat")
    for position in range(start + (len(data) - start) // 2, len(data), 500):
        data[position] ^= 0xFF
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"breaks off after \d+ of about 24 frames"):
        found = read_video(path)[0]
    assert 6 <= len(found) <= 14
    assert np.array_equal(found[:-1], whole[: len(found) - 1])  # the last may be wrong before it is seen to be


# What is no video.


def test_files_that_are_no_video_are_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video at all, but long enough to be looked at")
    (tmp_path / "empty.mp4").touch()
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.jpg")
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.bmp")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    for name, message in [
        ("text.mp4", "text.mp4' cannot be read as a video"),
        ("empty.mp4", "empty.mp4' cannot be read as a video"),
        ("missing.mp4", "the video '.*missing.mp4' does not exist"),
        ("gone.mp4", "the video '.*gone.mp4' does not exist"),
        ("picture.png", "picture.png' is a still picture, not a video"),
        ("picture.jpg", "picture.jpg' is a still picture, not a video"),
        ("picture.bmp", "picture.bmp' is a still picture, not a video"),
        ("", "is not a file"),
        ("x" * 300, "cannot be read: .*name too long"),
        ("a\0b", "cannot be read|does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_video(tmp_path / name)
    with pytest.raises(ValueError, match="is not a file"):
        read_video("/dev/zero")


def test_a_video_without_pictures_is_refused(tmp_path, video):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        samples.rate = 8000
        container.mux(stream.encode(samples))
    with pytest.raises(ValueError, match=r"holds no video, only 1 other stream$"):
        read_video(tmp_path / "sound.wav")
    with pytest.raises(ValueError, match=r"max_frames` must be an integer of at least 1, got 1\.5"):
        read_video(video, max_frames=1.5)
    for path in (None, 7, b"video.mp4"):
        with pytest.raises(ValueError, match=f"the video must be the path of a file, got {path!r}"):
            read_video(path)
    data = video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[:40])
    with pytest.raises(ValueError, match=r"cut\.mp4' holds no video$"):
        read_video(tmp_path / "cut.mp4")
    video.write_bytes(data[: data.index(b"moof") - 4])  # a header, and no frame
    with pytest.raises(ValueError, match="none of the frames"):
        read_video(video)


def test_the_cover_of_a_song_is_no_video(tmp_path):
    cover = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(cover, "PNG")
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        picture = container.add_stream("png", rate=1)
        picture.height, picture.width, picture.pix_fmt = 32, 32, "rgb24"
        picture.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts = 8000, 0
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts = picture, 0, 0
        container.mux(packet)
        container.mux(sound.encode(samples) + sound.encode(None))
    with pytest.raises(ValueError, match=r"holds no video, only 2 other streams$"):
        read_video(tmp_path / "song.m4a")


def test_a_title_that_is_not_utf8_does_not_matter_and_an_unknown_codec_is_refused(tmp_path, video):
    with av.open(str(tmp_path / "titled.mkv"), "w") as container:
        container.metadata["title"] = "ABCDEFGH"
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for packet in stream.encode(av.VideoFrame(64, 32, "yuv420p")) + stream.encode(None):
            container.mux(packet)
    data = (tmp_path / "titled.mkv").read_bytes()
    (tmp_path / "titled.mkv").write_bytes(data.replace(b"ABCDEFGH", b"\xff\xe4CDEFGH"))
    assert read_video(tmp_path / "titled.mkv")[0].shape == (1, 32, 64, 3)
    video.write_bytes(video.read_bytes().replace(b"avc1", b"xyz1"))
    with pytest.raises(ValueError, match=r"video.mp4' holds video of a format that PyAV .* cannot decode"):
        read_video(video)


@pytest.mark.parametrize("name", ["12:30.mp4", "concat:a.mp4", "~home.mp4", "100%d.mp4", "a b\nc.mp4"])
def test_any_name_that_the_system_allows(video, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video.rename(name)
    assert len(read_video(name)[0]) == 24


def test_a_pipe(video, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: Path(tmp_path / "pipe").write_bytes(video.read_bytes()))
    writer.start()
    frames, fps = read_video(tmp_path / "pipe")
    writer.join()
    assert (len(frames), fps) == (24, 24)
