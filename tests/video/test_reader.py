"""What a user hands in is read, or refused with a reason."""

import struct

import av
import numpy as np
import pytest
from PIL import Image

from longlive_diffusers.video.reader import read_image, read_video
from longlive_diffusers.video.writer import VideoWriter


@pytest.fixture
def video(tmp_path):
    """24 frames of 32x64, the left half white."""
    frames = np.zeros((24, 32, 64, 3), np.uint8)
    frames[:, :, :32] = 255
    with VideoWriter(tmp_path / "video.mp4") as writer:
        writer.write(frames)
    return tmp_path / "video.mp4"


@pytest.mark.parametrize(("max_frames", "count"), [(None, 24), (1, 1), (7, 7), (100, 24)])
def test_max_frames(video, max_frames, count):
    frames, fps = read_video(str(video), max_frames=max_frames)
    assert frames.shape == (count, 32, 64, 3)
    assert fps == 24
    with pytest.raises(ValueError, match="max_frames must be at least 1, but it is 0"):
        read_video(video, max_frames=0)


def test_a_video_that_breaks_off_is_read_as_far_as_it_goes(video):
    data = video.read_bytes()
    video.write_bytes(data[: data.rindex(b"mdat") + 12])  # within the data of the last of 24 frames
    with pytest.warns(UserWarning, match="incomplete: it was read up to frame 23"):
        frames, fps = read_video(video)
    assert frames.shape == (23, 32, 64, 3)
    assert fps == 24


def test_a_video_filmed_on_its_side_is_turned_upright(video):
    data = bytearray(video.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 36  # type, version and flags, then 36 bytes of other fields
    one = 1 << 16
    assert struct.unpack_from(">5i", data, matrix) == (one, 0, 0, 0, one)
    struct.pack_into(">9i", data, matrix, 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # a quarter turn clockwise
    video.write_bytes(data)
    frames, _ = read_video(video)
    assert frames.shape == (24, 64, 32, 3)
    assert frames[0, :30].min() > 250 and frames[0, 34:].max() < 5  # what was left is now above


def test_files_that_are_no_video_are_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video at all, but long enough to be looked at")
    (tmp_path / "empty.mp4").touch()
    for name, message in [
        ("text.mp4", "text.mp4' cannot be read as a video"),
        ("empty.mp4", "empty.mp4' cannot be read as a video"),
        ("missing.mp4", "the video '.*missing.mp4' does not exist"),
        ("", "is not a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_video(tmp_path / name)


def test_a_video_without_pictures_is_refused(tmp_path, video):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        samples.rate = 8000
        container.mux(stream.encode(samples))
    with pytest.raises(ValueError, match=r"holds no video, only 1 other stream"):
        read_video(tmp_path / "sound.wav")
    data = video.read_bytes()
    video.write_bytes(data[: data.index(b"moof") - 4])  # a header, and no frame
    with pytest.raises(ValueError, match="none of the frames"):
        read_video(video)


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


def test_images_are_rgb_and_upright(tmp_path):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 255
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    image = read_image(tmp_path / "alpha.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (6, 4), (200, 0, 0))

    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned a quarter clockwise
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 6)


def test_files_that_are_no_image_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name, message in [
        ("text.png", "text.png' cannot be read as an image: its format is not known"),
        ("cut.png", "cut.png' cannot be read as an image"),
        ("missing.png", "the image '.*missing.png' does not exist"),
        ("", "is not a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name)
