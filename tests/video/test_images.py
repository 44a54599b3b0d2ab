"""Pictures of every mode that Pillow opens are what a viewer shows, or are refused with a reason."""

import io
import os
import re
import struct
import subprocess
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, features

from longlive_diffusers.video.images import as_rgb, read_image


COLORS = np.array([[[200, 40, 60], [20, 180, 90]], [[250, 250, 250], [0, 0, 0]]], np.uint8).repeat(8, 0).repeat(8, 1)
RAMP = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)


def colors(mode: str) -> Image.Image:
    """The colors in a mode, all opaque."""
    image = Image.fromarray(COLORS)
    if mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    if mode in ("PA", "RGBa"):
        return colors("P" if mode == "PA" else "RGBA").convert(mode)
    if mode == "P":
        return image.convert("P", palette=Image.Palette.ADAPTIVE)
    return image.convert(mode)


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.array(image).astype(int)


@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [
        ("RGB", 0),
        ("RGBA", 0),
        ("RGBa", 0),
        ("RGBX", 0),
        ("P", 0),
        ("PA", 0),
        ("CMYK", 0),
        ("YCbCr", 2),
        ("HSV", 4),
        ("LAB", 6),  # 8 bits of it
    ],
)
def test_colors_of_every_mode(mode, tolerance):
    assert np.abs(array(as_rgb(colors(mode))) - COLORS).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "LA", "La", "I;16", "I;16B", "I;16L", "I 8 bits", "I 16 bits", "F 1", "F 255"])
def test_gray_of_every_mode(mode):
    wide = RAMP.astype(np.uint16) * 257
    image = {
        "L": lambda: Image.fromarray(RAMP),
        "LA": lambda: Image.fromarray(RAMP).convert("LA"),
        "La": lambda: Image.fromarray(RAMP).convert("LA").convert("La"),
        "I;16": lambda: Image.fromarray(wide),
        "I;16B": lambda: Image.frombytes("I;16B", (16, 16), wide.astype(">u2").tobytes()),
        "I;16L": lambda: Image.frombytes("I;16L", (16, 16), wide.astype("<u2").tobytes()),
        "I 8 bits": lambda: Image.fromarray(RAMP.astype(np.int32)),
        "I 16 bits": lambda: Image.fromarray(wide.astype(np.int32)),
        "F 1": lambda: Image.fromarray(RAMP.astype(np.float32) / 255),
        "F 255": lambda: Image.fromarray(RAMP).convert("F"),
    }[mode]()
    assert image.mode == mode.split()[0]
    assert np.array_equal(array(as_rgb(image)), RAMP[..., None].repeat(3, -1))


def test_black_and_white():
    assert array(as_rgb(Image.fromarray(RAMP > 99))).max(-1).tolist() == (255 * (RAMP > 99)).tolist()


def test_a_dark_picture_of_16_bits_stays_dark():
    assert array(as_rgb(Image.fromarray(np.full((4, 4), 200, np.uint16)))).max() == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), -5, np.int32), r"negative.*\[-5, -5\]"),
        (np.full((2, 2), 70_000, np.int32), "up to 70000"),
        (np.full((2, 2), 300, np.float32), r"\[0, 1\].*300"),
        (np.full((2, 2), -0.5, np.float32), r"\[0, 1\].*-0.5"),
        (np.full((2, 2), np.nan, np.float32), "not finite"),
        (np.array([[0, np.inf]], np.float32), "not finite"),
    ],
)
def test_gray_that_is_out_of_range_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        as_rgb(Image.fromarray(values))


# Transparency.

BLACK, WHITE, HALF = [0, 0, 0], [255, 255, 255], [127, 127, 127]


def half_transparent(mode: str) -> Image.Image:
    """Black: opaque on the left, transparent in the middle, half of both on the right."""
    pixels = np.zeros((4, 12, 4), np.uint8)
    pixels[..., 3] = np.repeat([255, 0, 128], 4)
    image = Image.fromarray(pixels)
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_transparency_is_laid_over_white(mode):
    row = array(as_rgb(half_transparent(mode)))[0]
    assert row[[0, 4, 8]].tolist() == [BLACK, WHITE, HALF]


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_color_that_is_declared_transparent_is_white(tmp_path, mode):
    image = Image.new(mode, (4, 4), 0)
    if mode == "P":
        image.putpalette([9, 9, 9] * 256)
    image.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == mode
        assert array(as_rgb(saved)).tolist() == [[WHITE] * 4] * 4
    assert array(read_image(tmp_path / "a.png")).tolist() == [[WHITE] * 4] * 4


# Orientation.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_every_orientation_of_exif(tmp_path, mode, orientation):
    stored = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = (
        Image.fromarray(stored.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(stored).convert(mode)
    )
    image.save(tmp_path / "a.png", exif=exif)
    shown = [
        stored,
        stored[:, ::-1],
        stored[::-1, ::-1],
        stored[::-1],
        stored.T,
        np.rot90(stored, -1),
        stored[::-1, ::-1].T,
        np.rot90(stored, 1),
    ][orientation - 1]
    with Image.open(tmp_path / "a.png") as opened:
        assert array(as_rgb(opened))[..., 0].tolist() == shown.tolist()
    assert array(read_image(tmp_path / "a.png"))[..., 0].tolist() == shown.tolist()


# Files.


def test_formats_of_more_than_8_bits(tmp_path):
    wide = RAMP.astype(np.uint16) * 257
    for name in ("a.png", "a.tiff", "a.ppm"):
        Image.fromarray(wide).save(tmp_path / name)
        assert np.array_equal(array(read_image(tmp_path / name))[..., 0], RAMP), name
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    assert np.array_equal(array(read_image(tmp_path / "float.tiff"))[..., 0], RAMP)
    Image.fromarray(COLORS).convert("CMYK").save(tmp_path / "a.tif")
    assert np.array_equal(array(read_image(tmp_path / "a.tif")), COLORS)


def test_files_that_are_no_image_are_refused(tmp_path, recwarn):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.bmp", "cut.tiff", "cut.gif", "cut.webp"):
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:700])
    bomb = bytearray(Image.new("1", (8, 8)).tobytes())
    (tmp_path / "bomb.pbm").write_bytes(b"P4 60000 60000\n" + bomb)
    for name, message in [
        ("text.png", "text.png' cannot be read as an image: its format is not known"),
        ("empty.png", "empty.png' cannot be read as an image: its format is not known"),
        *((f"cut.{suffix}", f"cut.{suffix}' cannot be read as an image") for suffix in ("png", "jpg", "bmp", "tiff")),
        ("cut.webp", "cut.webp' cannot be read as an image"),
        ("bomb.pbm", r"3600000000 pixels\) exceeds limit"),
        ("missing.png", "the image '.*missing.png' does not exist"),
        ("", "is not a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name)
    assert not recwarn.list


def test_a_file_that_breaks_off_given_as_a_picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ValueError, match="the picture cannot be read"):
        as_rgb(image)


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("P", bytes(300)), ("P", 300), ("P", -1), ("P", "x"), ("P", None), ("RGB", (1, 2)), ("RGB", b"abc"), ("1", b"1")],
)
def test_transparency_that_cannot_be_is_named(mode, transparency):
    image = Image.new(mode, (8, 8))
    image.info["transparency"] = transparency
    with pytest.raises(ValueError, match="the picture's transparency cannot be read: "):
        as_rgb(image)


def test_a_file_with_more_transparency_than_palette(tmp_path):
    path = tmp_path / "a.png"
    Image.new("P", (8, 8)).save(path)
    data = path.read_bytes()
    start = data.index(b"IDAT") - 4
    chunk = b"tRNS" + bytes(300)
    path.write_bytes(
        data[:start] + len(bytes(300)).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[start:]
    )
    with pytest.raises(ValueError, match=r"a\.png' cannot be read as an image: the picture's transparency"):
        read_image(path)


def avif_without_pixels() -> bytes:
    file = io.BytesIO()
    Image.fromarray(COLORS).save(file, "avif")
    header, _, pixels = file.getvalue().partition(b"mdat")
    return header + b"mdat" + bytes(len(pixels))


def dds_of_an_unknown_kind() -> bytes:
    file = io.BytesIO()
    Image.fromarray(COLORS).save(file, "dds")
    data = bytearray(file.getvalue())
    data[80:84] = bytes(4)  # the flags of its pixels
    return bytes(data)


def blp_of_an_unknown_kind() -> bytes:
    file = io.BytesIO()
    Image.fromarray(COLORS).convert("P").save(file, "blp")
    data = bytearray(file.getvalue())
    data[8] = 9  # its encoding
    return bytes(data)


def spider_of_a_stack() -> bytes:
    file = io.BytesIO()
    Image.fromarray(COLORS).convert("F").save(file, "spider")
    header = np.frombuffer(file.getvalue(), np.float32).copy()
    header[26] = 1  # the number of its picture; what says where its pictures are is missing
    return header.tobytes()


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        pytest.param(
            "a.avif",
            avif_without_pixels,
            marks=pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow that writes AVIF"),
        ),
        ("a.dds", dds_of_an_unknown_kind),
        ("a.blp", blp_of_an_unknown_kind),
        ("a.spider", spider_of_a_stack),
    ],
)
def test_whatever_pillow_raises_for_a_damaged_file_is_named(tmp_path, name, damaged):
    (tmp_path / name).write_bytes(damaged())
    with pytest.raises(ValueError, match=rf"{name}' cannot be read as an image: \S") as refusal:
        read_image(tmp_path / name)
    assert not isinstance(refusal.value.__cause__, OSError | ValueError)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("tile"),
        TypeError("an integer is required"),
        struct.error("unpack requires a buffer of 4 bytes"),
        zlib.error("Error -3 while decompressing data"),
        ZeroDivisionError("division by zero"),
        RuntimeError("Failed to decode frame 0"),
        subprocess.CalledProcessError(1, ["gs"]),  # which reads EPS
    ],
)
def test_what_pillow_may_raise_elsewhere_is_named(tmp_path, monkeypatch, error):
    def fail(image):
        raise error

    Image.fromarray(COLORS).save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(ValueError, match=re.escape(f"a.png' cannot be read as an image: {error}")):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "bmp", "webp", "ppm", "ico", "tga", "pcx", "sgi"])
def test_flipped_bytes_are_a_value_error_or_a_picture(tmp_path, suffix):
    path, rng = tmp_path / f"a.{suffix}", np.random.default_rng(0)
    Image.fromarray(COLORS).save(path)
    data = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 200), 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_image(path).mode == "RGB"
        except ValueError as error:
            assert path.name in str(error)


def test_a_large_picture_is_read_without_a_warning(tmp_path, monkeypatch, recwarn):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
    assert read_image(tmp_path / "a.png").size == (200, 100)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(ValueError, match="20000 pixels"):
        read_image(tmp_path / "a.png")


def test_an_image_from_a_pipe(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "a.png").read_bytes()))
    writer.start()
    image = read_image(tmp_path / "pipe")
    writer.join()
    assert np.array_equal(array(image), COLORS)
