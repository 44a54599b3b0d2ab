"""Images and videos in every form that callers have them: the right pixels, or an error that states the numbers."""

import numpy as np
import PIL.Image
import pytest
import torch

from longlive_diffusers.pipelines.conditions import image_to_pixels, video_to_pixels
from tests.support.checks import assert_raises, default_dtype, logged_by


RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (16, 24, 3), np.uint8)
BYTES[0, 0], BYTES[0, 1] = 255, 0
EXPECTED = torch.from_numpy(BYTES).permute(2, 0, 1).float() / 255 * 2 - 1
GRAY_LEVELS = BYTES[..., 0]


def image_pixels(image, height: int = 16, width: int = 24) -> torch.Tensor:
    return image_to_pixels(image, height, width)


def video_pixels(video, height: int = 16, width: int = 24) -> torch.Tensor:
    return video_to_pixels(video, height, width, chunk_size=2, temporal_scale=4)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).movedim(-1, -3)


# Numbers.

ARRAYS = {
    "uint8": BYTES,
    "int8-safe": BYTES.astype(np.int16),
    "uint16 of 8 bits": BYTES.astype(np.uint16),
    "int32 of 8 bits": BYTES.astype(np.int32),
    "uint32 of 8 bits": BYTES.astype(np.uint32),
    "int64 of 8 bits": BYTES.astype(np.int64),
    "uint64 of 8 bits": BYTES.astype(np.uint64),
    "uint16": BYTES.astype(np.uint16) * 257,
    "int32 of 16 bits": BYTES.astype(np.int32) * 257,
    "int64 of 16 bits": BYTES.astype(np.int64) * 257,
    "int32": BYTES.astype(np.int32) * ((2**31 - 1) // 255),
    "uint32": BYTES.astype(np.uint32) * 16843009,
    "int64": BYTES.astype(np.int64) * ((2**63 - 1) // 255),
    "float16": BYTES.astype(np.float16) / np.float16(255),
    "float32": BYTES.astype(np.float32) / 255,
    "float64": BYTES.astype(np.float64) / 255,
    "float64 with rounding": BYTES.astype(np.float64) / 255 * 1.0005,
}


@pytest.mark.parametrize("values", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("kind", ["array", "tensor", "big endian"])
def test_a_picture_of_every_dtype(values, kind):
    image = values
    if kind == "tensor":
        image = as_tensor(values)
    if kind == "big endian":
        image = values.astype(values.dtype.newbyteorder(">"))
    tolerance = 2e-3 if values.dtype in (np.float16, np.float64) else 1e-6
    found = image_pixels(image)
    assert found.shape == (1, 3, 1, 16, 24) and found.dtype == torch.float32
    assert (found[0, :, 0] - EXPECTED).abs().max() <= tolerance
    assert found.abs().max() <= 1
    frames = video_pixels(np.stack([values] * 5) if kind == "array" else [image] * 5)
    assert frames.shape == (1, 3, 5, 16, 24)
    assert torch.equal(frames[0, :, 4], found[0, :, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floating_tensors_also_where_gradients_are_tracked(dtype):
    image = as_tensor(BYTES).to(dtype) / 255
    assert (image_pixels(image.requires_grad_())[0, :, 0] - EXPECTED).abs().max() < 5e-3


def test_truths_are_black_and_white():
    found = image_pixels(BYTES > 99)[0, :, 0]
    assert torch.equal(found, as_tensor(BYTES > 99).float() * 2 - 1)


def test_exactly_what_8_bits_were_before():
    for image in (BYTES, as_tensor(BYTES), PIL.Image.fromarray(BYTES), BYTES.astype(np.float32) / 255):
        assert torch.equal(image_pixels(image)[0, :, 0], EXPECTED)


BAD_NUMBERS = {
    "floats up to 255": (BYTES.astype(np.float32), ["[0, 1]", "255"]),
    "floats in [-1, 1]": (BYTES.astype(np.float64) / 127.5 - 1, ["[0, 1]", "-1"]),
    "a little above 1": (np.full((16, 24, 3), 1.01), ["[0, 1]", "1.01"]),
    "not a number": (np.full((16, 24, 3), np.nan), ["finite"]),
    "one that is infinite": (np.where(BYTES == 255, np.inf, 0.5), ["finite"]),
    "negative integers": (BYTES.astype(np.int32) - 128, ["negative", "-128"]),
    "12 bits in 32": (np.full((16, 24, 3), 70_000), ["70000", "255", "65535"]),
    "complex numbers": (BYTES.astype(np.complex64), ["complex64"]),
    "objects": (BYTES.astype(object), ["object"]),
    "words": (np.full((16, 24, 3), "a"), ["<U1"]),
}


@pytest.mark.parametrize(("values", "numbers"), BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_numbers_that_are_no_picture_are_refused(values, numbers):
    assert_raises(lambda: image_pixels(values), "`image`", *numbers)
    assert_raises(lambda: video_pixels(np.stack([values] * 5)), "`video`", *numbers)
    if values.dtype.kind in "fiuc":
        assert_raises(lambda: image_pixels(as_tensor(values)), "`image`", *numbers[:1])


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_found_in_any_frame(value, index):
    frames = np.full((5, 16, 24, 3), 0.5, np.float32)
    frames[index, 3, 4, 1] = value
    for video in (frames, list(frames), as_tensor(frames)):
        assert_raises(lambda video=video: video_pixels(video), "`video`", "not finite")


def test_a_fade_to_black_in_16_bits_stays_16_bits():
    """Its last frames alone might be of 8 bits; so might those that are dropped from the beginning."""
    levels = [65535, 30000, 255, 100, 0, 0]
    video = np.stack([np.full((16, 24, 3), level, np.uint16) for level in levels])
    expected = torch.tensor(levels[1:]) / 65535 * 2 - 1
    with logged_by("longlive_diffusers"):
        assert torch.allclose(video_pixels(video)[0, 0, :, 0, 0], expected)
        assert torch.allclose(video_pixels(list(video))[0, 0, :, 0, 0], expected)


# Shapes.


@pytest.mark.parametrize(
    "image",
    [
        np.repeat(np.repeat(BYTES, 2, 0), 2, 1),
        as_tensor(np.repeat(np.repeat(BYTES, 2, 0), 2, 1)),
        PIL.Image.fromarray(np.repeat(np.repeat(BYTES, 2, 0), 2, 1)),
        np.repeat(np.repeat(BYTES, 2, 0), 2, 1) / 255.0,
    ],
    ids=["array", "tensor", "PIL", "floats"],
)
def test_every_kind_is_resized_alike(image):
    reference = image_pixels(PIL.Image.fromarray(np.repeat(np.repeat(BYTES, 2, 0), 2, 1)), 10, 14)
    assert (image_pixels(image, 10, 14) - reference).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["array", "floats", "16 bits", "tensor", "PIL"])
@pytest.mark.parametrize(("height", "width"), [(32, 96), (96, 32)])
def test_the_middle_is_shown_and_nothing_is_squashed(kind, height, width):
    """Of three stripes along the long side, a square shows the green one in the middle."""
    stripes = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        part = slice(32 * channel, 32 * channel + 32)
        stripes[(slice(None), part) if width > height else part][..., channel] = 255
    image = {
        "array": lambda: stripes,
        "floats": lambda: stripes / 255.0,
        "16 bits": lambda: stripes.astype(np.uint16) * 257,
        "tensor": lambda: as_tensor(stripes),
        "PIL": lambda: PIL.Image.fromarray(stripes),
    }[kind]()
    found = image_pixels(image, 64, 64)[0, :, 0, 6:-6, 6:-6]
    assert torch.equal(found.amax((1, 2)), torch.tensor([-1.0, 1, -1]))
    assert torch.equal(found.amin((1, 2)), torch.tensor([-1.0, 1, -1]))
    frames = video_pixels([image] * 5, 64, 64)[0, :, 4, 6:-6, 6:-6]
    assert torch.equal(frames, found)


BAD_SHAPES = {
    "gray": (GRAY_LEVELS, ["(16, 24)"]),
    "with transparency": (np.zeros((16, 24, 4), np.uint8), ["(16, 24, 4)"]),
    "one channel": (np.zeros((16, 24, 1), np.uint8), ["(16, 24, 1)"]),
    "an array with channels first": (np.zeros((3, 16, 24), np.uint8), ["[(F,) H, W, 3]", "(3, 16, 24)"]),
    "a tensor with channels last": (torch.zeros(16, 24, 3), ["[(F,) 3, H, W]", "(16, 24, 3)"]),
    "nothing": (np.zeros((0, 24, 3), np.uint8), ["(0, 24, 3)"]),
    "a picture without rows": (PIL.Image.new("RGB", (5, 0)), ["0x5"]),
    "a picture without columns": (PIL.Image.new("L", (0, 5)), ["5x0"]),
    "one number": (np.array(3), ["()"]),
    "a batch of videos": (np.zeros((2, 5, 16, 24, 3), np.uint8), ["(2, 5, 16, 24, 3)"]),
    "a file": ("cat.png", ["str"]),
    "none in a list": ([None], ["NoneType"]),
    "a video": ([[BYTES] * 5], ["list"]),
    "an empty list": ([], ["empty"]),
}


@pytest.mark.parametrize(("image", "numbers"), BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_what_is_no_image_is_refused(image, numbers):
    assert_raises(lambda: image_pixels(image), "`image`", *numbers)


# Lists.


def test_lists_of_frames_of_any_kind_are_one_video():
    frames = [BYTES, PIL.Image.fromarray(BYTES), as_tensor(BYTES), BYTES / 255.0, BYTES.astype(np.uint16) * 257]
    for video in (frames, tuple(frames), [frames], [BYTES] * 5, [as_tensor(BYTES)] * 5):
        found = video_pixels(video)
        assert found.shape == (1, 3, 5, 16, 24)
        assert (found - EXPECTED[None, :, None]).abs().max() < 1e-6


def test_batches():
    other = 255 - BYTES
    expected = torch.stack([EXPECTED, -EXPECTED])
    for images in (np.stack([BYTES, other]), as_tensor(np.stack([BYTES, other])), [BYTES, PIL.Image.fromarray(other)]):
        assert (image_pixels(images)[:, :, 0] - expected).abs().max() < 1e-6
    videos = np.stack([[BYTES] * 5, [other] * 5])
    for batch in (videos, as_tensor(videos), list(videos), [list(videos[0]), videos[1]], [videos[0], list(videos[1])]):
        found = video_pixels(batch)
        assert (found - expected[:, :, None]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("video", "numbers"),
    [
        (PIL.Image.fromarray(BYTES), ["single picture"]),
        (BYTES, ["single picture", "(16, 24, 3)"]),
        (as_tensor(BYTES), ["single picture", "(3, 16, 24)"]),
        ([BYTES] * 4, ["4", "5"]),
        ([BYTES[None]] * 5, ["1", "5"]),
        ([[BYTES] * 5, [BYTES] * 13], ["5", "13"]),
        ([BYTES] * 4 + [None], ["NoneType"]),
        ([BYTES] * 4 + [[BYTES]], ["1", "5"]),
        ([[BYTES] * 4 + [[BYTES]]], ["list"]),
        ("film.mp4", ["str"]),
        ([], ["empty"]),
        ([[]], ["0", "5"]),
    ],
)
def test_what_is_no_video_is_refused(video, numbers):
    assert_raises(lambda: video_pixels(video), "`video`" if numbers != ["5", "13"] else "frames", *numbers)


# Pillow's images; tests/video/test_images.py has all modes.


def test_images_are_upright_opaque_and_of_all_bits():
    image = PIL.Image.fromarray(np.rot90(BYTES, 1).copy())
    image.getexif()[0x0112] = 6  # to be turned a quarter clockwise
    assert torch.equal(image_pixels(image)[0, :, 0], EXPECTED)
    transparent = PIL.Image.new("RGBA", (24, 16), (0, 0, 0, 0))
    assert image_pixels(transparent).min() == 1
    wide = PIL.Image.fromarray(GRAY_LEVELS.astype(np.uint16) * 257)
    assert torch.equal(image_pixels(wide)[0, 1, 0], EXPECTED[0])
    assert torch.equal(video_pixels([wide] * 5)[0, 1, 4], EXPECTED[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_pixels_do_not_depend_on_the_default_dtype(dtype):
    picture = PIL.Image.fromarray(np.arange(16 * 24 * 3).astype(np.uint8).reshape(16, 24, 3))
    expected = image_pixels(picture)
    with default_dtype(dtype):
        found = image_pixels(picture)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
