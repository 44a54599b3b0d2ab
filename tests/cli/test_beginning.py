"""`--image` and `--video`: what is read of the file, and the size that its shape gives the video."""

import argparse
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from longlive_diffusers.cli import main
from longlive_diffusers.cli.beginning import read_beginning
from longlive_diffusers.pipelines.inputs import ModelSizes
from tests.support.video_files import ORIENTATIONS, encode_video, orient


SIZES = ModelSizes(
    latent_channels=16,
    text_dim=64,
    head_dim=32,
    chunk_size=2,
    patch_size=(2, 2),
    sample_size=(8, 8),
    spatial_scale=8,
    temporal_scale=4,
)  # those of the embedded model: 64x64 pixels, tokens of 16


def arguments(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"image": None, "video": None, "height": None, "width": None, **given})


def gray(count: int, height: int, width: int) -> np.ndarray:
    return np.broadcast_to((5 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def numbers(frames) -> list[int]:
    return [round(float(np.mean(frame)) / 5) for frame in frames]


@pytest.mark.parametrize(
    ("shape", "asked", "size", "is_told"),
    [
        ((300, 300), {}, (64, 64), False),
        ((90, 160), {}, (48, 80), True),
        ((160, 90), {}, (80, 48), True),
        ((90, 160), {"height": 32}, (32, 64), True),
        ((90, 160), {"width": 32}, (16, 32), True),
        ((90, 160), {"height": 32, "width": 32}, (32, 32), False),
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_size_follows_the_shape(tmp_path, kind, shape, asked, size, is_told):
    if kind == "image":
        path = tmp_path / "a.png"
        Image.new("RGB", shape[::-1]).save(path)
    else:
        path = encode_video(tmp_path / "a.mp4", np.zeros((6, *shape, 3), np.uint8))
    found = read_beginning(arguments(**{kind: str(path)}, **asked), SIZES, None)
    assert (found.height, found.width) == size
    if is_told:
        (note,) = found.notes
        assert f"{size[1]}x{size[0]} (width x height)" in note and f"'{path}' ({shape[1]}x{shape[0]})" in note
    else:
        assert not found.notes
    if kind == "video":
        assert found.video is not None and [frame.shape for frame in found.video] == [(*size, 3)] * 6


def test_without_either_the_size_is_what_is_asked_for_or_the_models():
    found = read_beginning(arguments(height=32), SIZES, None)
    assert (found.image, found.video, found.height, found.width, found.notes) == (None, None, 32, None, [])


def test_the_shape_is_that_of_what_a_player_shows(tmp_path):
    path = encode_video(tmp_path / "a.mp4", np.zeros((6, 96, 96, 3), np.uint8), pixel_aspect=2)
    path = orient(path, ORIENTATIONS["a quarter turn"])
    found = read_beginning(arguments(video=str(path)), SIZES, None)
    assert (found.height, found.width) == (96, 48)
    Image.new("RGB", (60, 120)).save(tmp_path / "a.jpg", exif=_turned())
    found = read_beginning(arguments(image=str(tmp_path / "a.jpg")), SIZES, None)
    assert (found.height, found.width) == (48, 96)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (30, [round(index * 30 / 24) for index in range(32)]),
        (12, [index // 2 for index in range(80)]),
        (60, [min(39, 5 * index // 2) for index in range(16)]),
    ],
)
def test_a_video_of_another_rate_gives_its_nearest_frames(tmp_path, fps, expected):
    path = encode_video(tmp_path / "a.mp4", gray(40, 32, 32), fps=fps)
    found = read_beginning(arguments(video=str(path)), SIZES, None)
    assert found.video is not None and len(found.video) == len(expected)
    assert all(abs(a - b) <= 1 for a, b in zip(numbers(found.video), expected, strict=True))


def test_film_rates_are_meant_to_be_24(tmp_path):
    """At their own times, one of 600 frames would come twice."""
    film = encode_video(tmp_path / "a.mp4", np.zeros((600, 32, 32, 3), np.uint8), fps=Fraction(24000, 1001))
    assert len(read_beginning(arguments(video=str(film)), SIZES, None).video or ()) == 600


def test_no_more_is_read_than_the_length_asked_for_allows(tmp_path):
    path = encode_video(tmp_path / "a.mp4", gray(40, 32, 32))
    found = read_beginning(arguments(video=str(path)), SIZES, 14)
    assert found.video is not None and len(found.video) == 21


def test_a_damaged_video_is_continued_from_where_it_breaks_off_and_this_is_said(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 64, 3), np.uint8)
    path = encode_video(tmp_path / "a.mp4", noise, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = read_beginning(arguments(video=str(path)), SIZES, None)
    (note,) = found.notes
    assert found.video is not None and f"breaks off after {len(found.video)} of about 48 frames" in note


def test_the_command_says_the_size_in_one_line(tmp_path, capsys):
    Image.new("RGB", (160, 90), "red").save(tmp_path / "a.png")
    options = ["--num-frames", "5", "--steps", "1", "--no-progress", "--no-lora"]
    options += ["--output", str(tmp_path / "out.mp4")]
    assert main(["generate", "a red circle", "--image", str(tmp_path / "a.png"), *options]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longlive: ")]
    assert len(lines) == 1 and "the video is 80x48" in lines[0]
