"""Counts in good English."""

import pytest

from longlive_diffusers.wording import alternatives, counted


@pytest.mark.parametrize(("count", "text"), [(0, "0 chunks"), (1, "1 chunk"), (2, "2 chunks")])
def test_one_is_singular(count, text):
    assert counted(count, "chunk") == text


@pytest.mark.parametrize(
    ("numbers", "text"), [((1, 1, 1), "1"), ((1, 3, 3), "1 or 3"), ((1, 1, 2), "1 or 2"), ((6, 1, 3), "1, 3 or 6")]
)
def test_every_number_is_named_once(numbers, text):
    assert alternatives(numbers) == text
