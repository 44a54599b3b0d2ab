"""The moving picture of the README: four videos under the prompts that they are made from."""

import sys

import numpy as np
import pytest
from PIL import Image

import animate


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["animate.py", *map(str, words)])
    animate.main()


def test_a_picture_is_made_of_videos_whose_prompts_change(tmp_path, monkeypatch):
    prompts = {0: "a red circle moves left", 1: "a large white square moves up, teal background"}
    clips = (
        animate.Clip("one", {0: prompts[0]}),
        animate.Clip("two", prompts),
        animate.Clip("three", prompts, cuts=True),
    )
    monkeypatch.setattr(animate, "CLIPS", clips)
    monkeypatch.setattr(animate, "NUM_CHUNKS", 2)
    monkeypatch.setattr(animate, "NUM_STEPS", 8)
    run(monkeypatch, "--output", tmp_path / "toy.webp")
    columns = [slice(start, start + animate.SIDE) for start in range(0, 3 * animate.SIDE, animate.SIDE + animate.GAP)]
    with Image.open(tmp_path / "toy.webp") as picture:
        assert picture.n_frames == 7  # every second one of 13
        assert picture.size == (columns[-1].stop, animate.TEXT_HEIGHT + animate.SIDE)
        frames = []
        for index in (0, picture.n_frames - 1):
            picture.seek(index)
            frames.append(np.asarray(picture.convert("RGB"), np.float32))
    one, two, three = ([frame[:, column] for frame in frames] for column in columns)  # the first frame and the last
    below, above = slice(animate.TEXT_HEIGHT, None), slice(20, animate.TEXT_HEIGHT)
    for changed in (two, three):
        assert np.abs(one[0][below] - changed[0][below]).mean() < 2, "the same prompt and noise"
        assert np.abs(one[1][below] - changed[1][below]).mean() > 20, "another prompt"
        assert np.abs(changed[0][above] - changed[1][above]).mean() > 5, "which is written above it"
    assert np.abs(one[0][above] - one[1][above]).mean() < 2
    assert list(tmp_path.iterdir()) == [tmp_path / "toy.webp"]


def test_another_kind_of_file_is_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--output is a \.webp file, got '.*toy\.mp4'"):
        run(monkeypatch, "--output", tmp_path / "toy.mp4")
