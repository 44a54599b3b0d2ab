"""Paths as people write them, wherever one is taken."""

import re
from pathlib import Path

import pytest

from longlive_diffusers.user_path import user_path
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("~/a", "home/a"),
        ("~", "home"),
        ("~nosuchuser/a", "~nosuchuser/a"),
        ("~backup.mp4", "~backup.mp4"),
        ("a/~/b", "a/~/b"),
        (Path("~/a"), "home/a"),
    ],
)
def test_a_home_is_found_and_other_names_stay(monkeypatch, written, path):
    monkeypatch.setenv("HOME", "home")
    assert user_path(written) == Path(path)


def test_nothing_reads_paths_in_another_way():
    """pathlib's way ends in a RuntimeError for a file that is called `~x`."""
    files = [
        file for folder in ("longlive_diffusers", "training", "examples") for file in (ROOT / folder).rglob("*.py")
    ]
    others = [file.name for file in files if re.search(r"\.expanduser\(", file.read_text())]
    assert sorted(others) == ["command_line.py", "user_path.py"]  # the former has names of repositories, too
