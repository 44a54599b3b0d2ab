"""Shots files in text and JSON, and what is said about malformed ones."""

import json
import re

import pytest

from longlive_diffusers.cli.shots_file import RequestedShot, read_shots


SHOTS = [RequestedShot("A fox runs.", 3), RequestedShot("[It] drinks, é 🦊", 2)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("shots.txt", "# a film\n\n[3] A fox runs.\n  [ 2 ]   [It] drinks, é 🦊  \n"),
        ("shots", "\ufeff[3] A fox runs.\r\n[2] [It] drinks, é 🦊\r\n"),
        ("shots.json", json.dumps([{"prompt": shot.prompt, "chunks": shot.chunks} for shot in SHOTS])),
        ("shots.txt", json.dumps([{"prompt": shot.prompt, "chunks": shot.chunks} for shot in SHOTS], indent=1)),
    ],
)
def test_shots_are_read(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    assert read_shots(path) == SHOTS


@pytest.mark.parametrize("text", ["A fox runs.\nIt drinks.", '[{"prompt": "A fox runs."}, {"prompt": "It drinks."}]'])
def test_durations_may_be_left_to_the_length_of_the_video(tmp_path, text):
    path = tmp_path / "shots.txt"
    path.write_text(text)
    assert read_shots(path) == [RequestedShot("A fox runs."), RequestedShot("It drinks.")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.txt",
            "[2] one\n\n[x] two",
            "line 3: a shot lasts a whole number of chunks, from 1 to 10000000, not '[x]'",
        ),
        ("a.txt", "[0] one", "line 1: a shot lasts a whole number of chunks, from 1 to 10000000, not '[0]'"),
        ("a.txt", "[-1] one", "line 1: a shot lasts"),
        ("a.txt", "[2] one\n[3]", "line 2: there is no prompt after '[3]'"),
        ("a.txt", "[2] one\n# two\nthree", "line 3: no duration, but other shots have one"),
        ("a.txt", "# nothing\n\n", "has no shots"),
        ("a.json", "[]", "has no shots"),
        ("a.json", '[\n {"prompt": "one",}\n]', "line 2, column 19: not JSON"),
        ("a.json", '{"prompt": "one"}', "holds a JSON dict, not a list"),
        (
            "a.json",
            '[{"prompt": "one"}, {"prompt": 2}]',
            'shot 2: not an object with a text as "prompt": {"prompt": 2}',
        ),
        ("a.json", '["one"]', "shot 1: not an object"),
        ("a.json", '[{"prompt": " "}]', "shot 1: not an object"),
        ("a.json", '[{"prompt": "one", "chunks": 1.5}]', 'shot 1: "chunks" is not an integer from 1 to 10000000: 1.5'),
        ("a.txt", "[10000001] one", "from 1 to 10000000, not '[10000001]'"),
        ("a.txt", f"[{'9' * 5000}] one", "line 1: a shot lasts"),
        ("a.json", '[{"prompt": "one", "chunks": 10000001}]', "from 1 to 10000000: 10000001"),
        ("a.json", f'[{{"prompt": "one", "chunks": {"9" * 5000}}}]', "holds a number that is too large"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '[{"prompt": "one", "chunks": true}]', 'shot 1: "chunks" is not'),
        ("a.json", '[{"prompt": "one", "seconds": 2}]', "shot 1: no such setting: seconds"),
        ("a.json", '[{"prompt": "one", "chunks": 2}, {"prompt": "two"}]', "shot 2: no duration"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_shots(path)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(ValueError, match="no shots file"):
        read_shots(tmp_path / "missing.txt")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_shots(tmp_path / "image.txt")
