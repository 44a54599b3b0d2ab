"""What a folder holds, and what is wrong with the rest."""

import pytest

from data.clips import scan
from tests.support.training_sets import clip_path, write_captions


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
        (b'{"caption": 3}', "has no text named 'caption'"),
        (b'{"caption": "  "}', "the caption in '000002.json' is empty"),
        (b'{"caption": "a \\ud800 b"}', "the caption in '000002.json' is no text"),
        (b'{"caption": "one", "cut": 1}', "'cut' in '000002.json' must be true or false, but it is 1"),
    ],
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
    (tmp_path / "video" / "empty").mkdir()
    (tmp_path / "caption" / "empty").mkdir()
    sample(tmp_path, "twice", ["one"], clips=1)
    (tmp_path / "video" / "twice" / "000001.mov").touch()
    samples, skipped = scan(tmp_path)
    assert [found.name for found in samples] == ["good"]
    assert skipped == {
        "few captions": "2 caption(s) are missing: 000002, 000003",
        "few clips": "1 clip(s) are missing: 000002",
        "no captions": "it has clips, but no folder of captions",
        "no clips": "it has captions, but no folder of clips",
        "empty": "it has 0 clips",
        "twice": "'000001.mov' and '000001.mp4' have one name",
    }


def test_a_root_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"needs the folder '.*nowhere/caption', but there is none"):
        scan(tmp_path / "nowhere")
    (tmp_path / "caption").mkdir()
    with pytest.raises(ValueError, match=r"needs the folder '.*/video', but there is none"):
        scan(tmp_path)
    (tmp_path / "video").mkdir()
    with pytest.raises(ValueError, match="has no sample that can be used; 0 samples were found"):
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
