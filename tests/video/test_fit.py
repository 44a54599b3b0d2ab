"""The part of a picture that is shown, and the size of a video that takes a picture's shape."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from longlive_diffusers.video.fit import fit, size_like, size_within


def test_the_middle_is_shown_and_nothing_is_squashed():
    pixels = np.zeros((30, 90, 3), np.uint8)
    for channel in range(3):
        pixels[:, 30 * channel : 30 * channel + 30, channel] = 200
    shown = np.array(fit(Image.fromarray(pixels), 60, 60))
    assert shown.shape == (60, 60, 3)
    assert (shown[:, 4:-4] == (0, 200, 0)).all()
    shown = np.array(fit(Image.fromarray(pixels), 30, 90, Fraction(1)))
    assert np.array_equal(shown, pixels)
    shown = np.array(fit(Image.fromarray(pixels), 90, 90, Fraction(1, 3)))  # narrow pixels: all of it is a square
    assert [shown[45, x].argmax() for x in (10, 45, 80)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("shape", "asked", "size"),
    [
        ((1080, 1920), (None, None), (704, 1280)),  # the default, as near as tokens of 32 allow
        ((1920, 1080), (None, None), (1280, 704)),
        ((1000, 1000), (None, None), (960, 960)),
        ((3000, 4000), (None, None), (832, 1088)),
        ((1080, 1920), (480, None), (480, 864)),
        ((1080, 1920), (None, 640), (352, 640)),
        ((1080, 1920), (480, 480), (480, 480)),
        ((1, 10_000), (None, None), (320, 2688)),
        ((10_000, 1), (64, None), (64, 32)),
    ],
)
def test_sizes_for_the_published_model(shape, asked, size):
    assert size_like(shape, (704, 1280), (32, 32), *asked) == size


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_size_has_about_as_many_pixels_as_the_default_and_the_shape_of_the_picture(height, width):
    found = size_like((height, width), (704, 1280), (32, 32))
    assert found[0] % 32 == found[1] % 32 == 0
    assert 0.9 < found[0] * found[1] / (704 * 1280) < 1.1
    aspect = min(max(width / height, 1 / 8), 8)
    assert abs(math.log(found[1] / found[0] / aspect)) < 0.1


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_smallest_size_is_one_token(height, width):
    found = size_like((height, width), (64, 64), (64, 64))
    assert min(found) >= 64 and found[0] * found[1] <= 3 * 64 * 64


@given(st.integers(1, 2_000_000))
def test_a_size_within_a_number_of_pixels_is_nearly_as_large_as_it_may_be(most):
    size = (704, 1280)
    if most < 1862:  # of this shape, 32 pixels high
        with pytest.raises(ValueError, match=f"{most} pixels are too few for a picture of the shape 704 x 1280"):
            size_within(most, size, (32, 32))
        return
    height, width = size_within(most, size, (32, 32))
    assert height % 32 == width % 32 == 0 and height * width <= most
    assert (height + 32) * (width + 32) > min(most, 704 * 1280) and height <= 704 and width <= 1280


def test_a_size_that_is_small_enough_is_kept():
    assert size_within(704 * 1280, (704, 1280), (32, 32)) == (704, 1280)
    assert size_within(64 * 64 - 1, (64, 64), (16, 16)) == (48, 48)
