"""Names are ordered as people number them, and are one name however their accents are encoded."""

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.names import find_file, natural_order, plain_name


@pytest.mark.parametrize(
    "names",
    [
        ["1", "2", "9", "10", "11", "100"],
        ["shot1", "shot2", "shot10", "shot11"],
        ["1-1", "1-2", "1-10", "2-1", "10-1"],
        ["v1.2", "v1.9", "v1.10", "v2.0"],
        ["000001", "000002", "000010"],
        ["01", "1", "002", "3"],
        ["a", "a1", "a2", "a10", "b1"],
        ["", "-1", "0", "00", "a"],
        ["9" * 5000, "1" + "0" * 5000],
        ["B1", "a1", "a2"],  # capitals first, as ever
        ["第2集", "第10集"],
        ["1a", "1b", "2a"],
        ["shot 2", "shot 10", "shot10"],
    ],
    ids=lambda names: " ".join(names)[:30],
)
def test_numbers_are_ordered_by_their_value(names):
    for seed in range(20):
        assert sorted(random.Random(seed).sample(names, len(names)), key=natural_order) == names


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=20))
def test_everything_else_is_ordered_as_plain_strings(names):
    padded = ["".join(letter for letter in name if not letter.isdigit()) for name in names]
    assert sorted(padded, key=natural_order) == sorted(padded)


@given(st.lists(st.integers(0, 10**6), unique=True), st.text("ab-_. ", max_size=3), st.text("ab-_. ", max_size=3))
def test_numbers_within_a_name(numbers, before, after):
    names = [f"{before}{number}{after}" for number in numbers]
    assert sorted(names, key=natural_order) == [f"{before}{number}{after}" for number in sorted(numbers)]
    padded = [f"{before}{number:07d}{after}" for number in numbers]
    assert sorted(padded, key=natural_order) == sorted(padded), "as before"


@pytest.mark.parametrize("name", ["café.mp4", "Ångström", "한국어", "ガ", "plain"])
def test_accents(name):
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    assert {plain_name(form) for form in forms} == {unicodedata.normalize("NFC", name)}


def test_a_plain_name_can_always_be_written():
    for name in ("caf\udce9", "\ud800", "a\udfffb"):
        plain_name(name).encode("utf-8")


def test_a_file_is_found_by_a_name_of_other_accents(tmp_path):
    apart = unicodedata.normalize("NFD", "é.mp4")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / apart).touch()
    assert find_file(tmp_path, "clips/é.mp4") == tmp_path / "clips" / apart
    assert find_file(tmp_path, f"clips/{apart}") == tmp_path / "clips" / apart
    for name in ("clips", "e.mp4", "clips/e.mp4", "nowhere/é.mp4", "", "\0", "\ud800", "x" * 5000):
        assert find_file(tmp_path, name) is None
