"""A folder of clips for each sample: what is found, in which order, and what is wrong with the rest."""

import os
import unicodedata

import pytest

from data.clips import scan
from data.samples import VIDEO_SUFFIXES
from tests.support.training_sets import clip_path, write_captions


SUFFIXES = ", ".join(VIDEO_SUFFIXES)


def sample_file(root, kind: str, name: str, file_name: str):
    path = root / kind / name / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def touch(root, name: str, count: int) -> None:
    """Clips that only have to be there: scanning opens none."""
    for number in range(1, count + 1):
        path = clip_path(root, name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def sample(root, name="a", captions=("one", "two"), clips=2, durations=None):
    touch(root, name, clips)
    write_captions(root, name, captions, durations)


def test_clips_captions_cuts_and_durations(tmp_path):
    sample(tmp_path, "b", [" one ", {"caption": "two", "cut": False}, {"caption": "three", "cut": True}], 3, "2, 1\n3")
    sample(tmp_path, "a", [{"caption": "one", "cut": False, "more": [1]}], 1)
    (tmp_path / "video" / ".hidden").mkdir()
    (tmp_path / "video" / "b" / "._000001.mp4").touch()
    (tmp_path / "video" / "b" / "notes.txt").touch()
    (tmp_path / "video" / "file").touch()
    (a, b), skipped = scan(tmp_path)
    assert skipped == {}
    assert (a.name, a.durations, [clip.cut for clip in a.clips]) == ("a", None, [True]), "the first clip opens a shot"
    assert [clip.path for clip in b.clips] == [clip_path(tmp_path, "b", number) for number in (1, 2, 3)]
    assert [clip.caption for clip in b.clips] == ["one", "two", "three"]
    assert [clip.cut for clip in b.clips] == [True, False, True]
    assert b.durations == (2, 1, 3)


def test_clips_and_samples_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("sample 2", "sample 10", "sample 1", "Sample 3"):
        for number in (1, 2, 10, 11, 9):
            sample_file(tmp_path, "video", name, f"shot{number}.mp4").touch()
            sample_file(tmp_path, "caption", name, f"shot{number}.json").write_text(f'{{"caption": "{number}"}}')
    (tmp_path / "caption" / "sample 1" / "shot_durations.txt").write_text("1 2 9 10 11")
    samples, skipped = scan(tmp_path)
    assert skipped == {}
    assert [found.name for found in samples] == ["Sample 3", "sample 1", "sample 2", "sample 10"]
    assert all([clip.caption for clip in found.clips] == ["1", "2", "9", "10", "11"] for found in samples)
    assert samples[1].durations == (1, 2, 9, 10, 11)
    alone = scan(tmp_path, text_only=True)[0][0]
    assert [clip.caption for clip in alone.clips] == ["1", "2", "9", "10", "11"]


@pytest.mark.parametrize("suffix", [*VIDEO_SUFFIXES, ".MP4", ".Avi"])
def test_containers(tmp_path, suffix):
    sample_file(tmp_path, "video", "a", f"1{suffix}").touch()
    sample_file(tmp_path, "caption", "a", "1.json").write_text('{"caption": "one"}')
    assert [clip.path.name for clip in scan(tmp_path)[0][0].clips] == [f"1{suffix}"]


def test_accents_may_be_encoded_in_two_ways(tmp_path):
    """macOS takes letters and accents apart in the names of files."""
    composed, apart = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    assert composed != apart
    sample_file(tmp_path, "video", apart, f"{composed}.mp4").touch()
    sample_file(tmp_path, "caption", composed, f"{apart}.json").write_text('{"caption": "one"}')
    (found,), skipped = scan(tmp_path)
    assert (found.name, found.clips[0].caption, skipped) == (composed, "one", {})
    for name in (composed, apart):
        sample_file(tmp_path, "video", "b", f"{name}.mp4").touch()
        sample_file(tmp_path, "video", f"x{name}", "1.mp4").touch()
    sample_file(tmp_path, "caption", "b", f"{apart}.json").write_text('{"caption": "one"}')
    sample_file(tmp_path, "caption", f"x{composed}", "1.json").write_text('{"caption": "one"}')
    skipped = scan(tmp_path)[1]
    assert skipped["b"] == f"'{apart}.mp4' and '{composed}.mp4' have one name"
    assert skipped[f"x{composed}"].startswith("two folders have this name, with accents")


def test_a_name_that_is_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    sample_file(tmp_path, "video", name, "1.mp4").touch()
    sample_file(tmp_path, "caption", name, "1.json").write_text('{"caption": "one"}')
    assert scan(tmp_path)[0][0].name == r"caf\udce9"


def test_durations_may_lie_beside_the_clips(tmp_path):
    sample(tmp_path)
    (tmp_path / "video" / "a" / "shot_durations.txt").write_text("4 5")
    assert scan(tmp_path)[0][0].durations == (4, 5)


@pytest.mark.parametrize(
    ("durations", "reason"),
    [
        ("1", "has 1 durations for 2 clips"),
        ("", "has 0 durations for 2 clips"),
        ("1 2 3", "has 3 durations for 2 clips"),
        ("1 0", "whole numbers of at least 1, but it has '0'"),
        ("1 -2", "but it has '-2'"),
        ("1 2.5", r"but it has '2\.5'"),
        ("one two", "but it has 'one'"),
        ("1;2", "but it has '1;2'"),
        ("1 " + "9" * 5000, "but it has '9+'"),
    ],
)
def test_wrong_durations(tmp_path, durations, reason):
    sample(tmp_path, durations=durations)
    with pytest.raises(ValueError, match=f"1 of 1 samples were left out: 'a': 'shot_durations.txt' .*{reason}"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b'{"caption": "on', "is not JSON"),
        (b'{"caption": "\xff"}', "is not JSON in UTF-8"),
        (b'["one"]', "has no text named 'caption'"),
        (b'{"text": "one"}', "has no text named 'caption'"),
        (b'{"caption": 3}', "the caption in '000002.json' must be a text, but it is 3"),
        (b'{"caption": ["one"]}', "must be a text, but it is ['one']"),
        (b'{"caption": null}', "must be a text, but it is None"),
        (b'{"caption": {"en": "one"}}', "must be a text, but it is {'en': 'one'}"),
        (b'{"caption": [' + b"1, " * 1000 + b"1]}", "must be a text, but it is [1, 1, "),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"caption": ' * 100_000, "is nested too deeply"),
        (b'{"caption": "one", "frames": ' + b"9" * 5000 + b"}", "has a number of too many digits"),
        (b'\xff\xfe{\x00"\x00', "is not JSON in UTF-8"),
        (b'{"caption": "one", "cut": "false"}', "'cut' in '000002.json' must be true or false, but it is 'false'"),
        (b'{"caption": "one", "cut": null}', "must be true or false, but it is None"),
        (b'{"caption": "  "}', "the caption in '000002.json' is empty"),
        (b'{"caption": "a \\ud800 b"}', "the caption in '000002.json' is no text"),
        (b'{"caption": "one", "cut": 1}', "'cut' in '000002.json' must be true or false, but it is 1"),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else "",
)
def test_a_sample_with_a_wrong_caption_is_left_out_and_the_others_are_not(tmp_path, content, reason):
    sample(tmp_path, "good")
    sample(tmp_path, "bad")
    (tmp_path / "caption" / "bad" / "000002.json").write_bytes(content)
    samples, skipped = scan(tmp_path)
    assert [found.name for found in samples] == ["good"]
    assert list(skipped) == ["bad"]
    assert reason in skipped["bad"] and "000002.json" in skipped["bad"]


def test_utf8_with_and_without_a_mark(tmp_path):
    sample(tmp_path)
    (tmp_path / "caption" / "a" / "000001.json").write_text('{"caption": "ein Bär"}', encoding="utf-8-sig")
    (tmp_path / "caption" / "a" / "000002.json").write_text('{"caption": "一只猫"}', encoding="utf-8")
    assert [clip.caption for clip in scan(tmp_path)[0][0].clips] == ["ein Bär", "一只猫"]


def test_what_has_no_counterpart_is_named(tmp_path):
    sample(tmp_path, "good")
    sample(tmp_path, "few captions", ["one"], clips=3)
    sample(tmp_path, "few clips", ["one", "two"], clips=1)
    touch(tmp_path, "no captions", 1)
    write_captions(tmp_path, "no clips", ["one"])
    sample(tmp_path, "other kind")
    clip_path(tmp_path, "other kind", 2).rename(tmp_path / "video" / "other kind" / "000002.gif")
    write_captions(tmp_path, "other kinds", ["one", "two"])
    for name in ("1.gif", "2.gif", "notes.doc", "thumbnails"):
        sample_file(tmp_path, "video", "other kinds", name).touch()
    (tmp_path / "video" / "empty").mkdir()
    (tmp_path / "caption" / "empty").mkdir()
    sample(tmp_path, "twice", ["one"], clips=1)
    (tmp_path / "video" / "twice" / "000001.mov").touch()
    samples, skipped = scan(tmp_path)
    assert [found.name for found in samples] == ["good"]
    assert skipped == {
        "few captions": "2 caption(s) are missing: 000002, 000003",
        "few clips": "1 clip(s) are missing: 000002",
        "other kind": f"1 clip(s) are missing: 000002 (there is 000002.gif, but clips are {SUFFIXES})",
        "no captions": "it has clips, but no folder of captions",
        "no clips": "it has captions, but no folder of clips",
        "empty": "it has 0 clips",
        "other kinds": f"it has 0 clips (there is 1.gif, 2.gif, notes.doc and 1 more, but clips are {SUFFIXES})",
        "twice": "'000001.mov' and '000001.mp4' have one name",
    }


def test_a_root_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file", "x" * 5000):
        with pytest.raises(ValueError, match=rf"There is no folder '.*{name}' with a training set"):
            scan(tmp_path / name)
    (tmp_path / "caption").mkdir()
    with pytest.raises(ValueError, match=r"has a folder of captions needs '.*/video', but there is none"):
        scan(tmp_path)
    (tmp_path / "video").mkdir()
    with pytest.raises(ValueError, match=r"caption' has no folders, of which a training set has one for each sample"):
        scan(tmp_path)
    for number in range(30):
        touch(tmp_path, f"{number:02d}", 1)
    with pytest.raises(ValueError, match=r"30 of 30 samples were left out: '00': it has clips.*'19': .*; and 10 more"):
        scan(tmp_path)


def test_captions_alone(tmp_path):
    write_captions(tmp_path, "a", ["one", {"caption": "two", "cut": False}], "1 2")
    (found,), skipped = scan(tmp_path, text_only=True)
    assert skipped == {}
    assert [(clip.path, clip.caption, clip.cut) for clip in found.clips] == [(None, "one", True), (None, "two", False)]
    assert found.durations == (1, 2)
