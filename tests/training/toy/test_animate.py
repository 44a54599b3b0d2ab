"""The moving picture of the README: four videos under the prompts that they are made from."""

import sys

import numpy as np
import pytest
from PIL import Image

import animate


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["animate.py", *map(str, words)])
    animate.main()


@pytest.mark.parametrize("cuts", [False, True])
def test_a_picture_is_made_of_videos_whose_prompts_change(tmp_path, monkeypatch, cuts):
    clips = (
        animate.Clip("one", {0: "a red circle moves left"}),
        animate.Clip("two", {0: "a red circle moves left", 1: "a large white square moves up, teal background"}, cuts),
    )
    monkeypatch.setattr(animate, "CLIPS", clips)
    monkeypatch.setattr(animate, "NUM_CHUNKS", 3)
    run(monkeypatch, "--output", tmp_path / "toy.webp")
    with Image.open(tmp_path / "toy.webp") as picture:
        assert picture.n_frames == 11  # every second one of 21
        assert picture.size == (2 * animate.SIDE + animate.GAP, animate.TEXT_HEIGHT + animate.SIDE)
        frames = []
        for index in range(picture.n_frames):
            picture.seek(index)
            frames.append(np.asarray(picture.convert("RGB"), np.float32))
    halves = [(frame[:, : animate.SIDE], frame[:, -animate.SIDE :]) for frame in frames]
    left, right = (np.stack(half) for half in zip(*halves, strict=True))
    below, above = slice(animate.TEXT_HEIGHT, None), slice(20, animate.TEXT_HEIGHT)
    assert np.abs(left[0, below] - right[0, below]).mean() < 2, "the same prompt and noise"
    assert np.abs(left[-1, below] - right[-1, below]).mean() > 20, "another prompt"
    assert np.abs(right[0, above] - right[-1, above]).mean() > 5, "which is written above it"
    assert np.abs(left[0, above] - left[-1, above]).mean() < 2
    assert list(tmp_path.iterdir()) == [tmp_path / "toy.webp"]


def test_another_kind_of_file_is_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--output is a \.webp file, got '.*toy\.mp4'"):
        run(monkeypatch, "--output", tmp_path / "toy.mp4")
