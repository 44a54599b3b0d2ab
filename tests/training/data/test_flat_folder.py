"""Clips with captions beside them: each is a sample."""

import os
import unicodedata

import pytest

from data.clips import VideoDataset, scan
from data.samples import VIDEO_SUFFIXES
from tests.support.training_sets import SIDE, frame_numbers, gray_frames, write_in_container, write_video


def write(root, name: str, text: str | bytes = ""):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def test_clips_and_captions(tmp_path):
    hidden = (".hidden.mp4", ".trash/x.mp4")
    for name in ("clip10.mp4", "clip9.MOV", "more/owl.webm", "dir.d/a.b.mkv", "notes.md", *hidden):
        write(tmp_path, name)
    write(tmp_path, "clip10.txt", "\ufeff A fox\n in the snow \n")
    write(tmp_path, "clip9.json", '{"caption": "A cat"}')
    write(tmp_path, "more/owl.TXT", "An owl")
    write(tmp_path, "dir.d/a.b.txt", "一只猫")
    samples, skipped = scan(tmp_path)
    assert skipped == {}
    assert [(found.name, found.clips[0].path.name, found.clips[0].caption) for found in samples] == [
        ("clip9", "clip9.MOV", "A cat"),
        ("clip10", "clip10.mp4", "A fox\n in the snow"),
        ("dir.d/a.b", "a.b.mkv", "一只猫"),
        ("more/owl", "owl.webm", "An owl"),
    ]
    assert all(len(found.clips) == 1 and found.clips[0].cut and found.durations is None for found in samples)


def test_what_has_no_counterpart_or_no_text_is_named(tmp_path):
    unreadable = ("empty.mp4", "binary.mp4", "utf16.mp4", "unmarked.mp4")
    for name in ("good.mp4", "no text.mp4", "two.mp4", "two.avi", "both.mp4", *unreadable):
        write(tmp_path, name)
    for name in ("good.txt", "two.txt", "both.txt", "no clip.txt", "other kind.txt"):
        write(tmp_path, name, "a text")
    write(tmp_path, "empty.txt", " \n")
    write(tmp_path, "binary.txt", b"\xff\x00")
    write(tmp_path, "utf16.txt", "a text".encode("utf-16"))
    write(tmp_path, "unmarked.txt", "a text".encode("utf-16-le"))
    write(tmp_path, "both.json", '{"caption": "another"}')
    write(tmp_path, "other kind.gif")
    samples, skipped = scan(tmp_path)
    assert [found.name for found in samples] == ["good"]
    for name, reason in {
        "no text": "there is no caption beside 'no text.mp4', neither 'no text.txt' nor 'no text.json'",
        "empty": "the caption in 'empty.txt' is empty",
        "binary": "'binary.txt' is not text in UTF-8",
        "utf16": "'utf16.txt' is not text in UTF-8",
        "unmarked": "the caption in 'unmarked.txt' is no text: it has a zero byte, as UTF-16 has",
        "two": "'two.avi' and 'two.mp4' have one name",
        "both": "'both.json' and 'both.txt' have one name",
        "no clip": "there is no clip beside 'no clip.txt' (clips are .avi, ",
        "other kind": "there is no clip beside 'other kind.txt' (clips are .avi, ",
    }.items():
        assert skipped.pop(name).startswith(reason)
    assert skipped == {}


def test_accents_and_names_that_are_no_text(tmp_path):
    write(tmp_path, "é.mp4")
    write(tmp_path, unicodedata.normalize("NFD", "é.txt"), "a text")
    write(tmp_path, os.fsdecode(b"\xe9.mp4"))
    write(tmp_path, os.fsdecode(b"\xe9.txt"), "another")
    assert [found.name for found in scan(tmp_path)[0]] == [r"\udce9", "é"]


def test_a_folder_that_is_no_training_set(tmp_path):
    write(tmp_path, "readme.md")
    with pytest.raises(ValueError, match=r"is no training set: it has neither 'caption/' .* nor 'metadata.jsonl'"):
        scan(tmp_path)
    write(tmp_path, "a.mp4")
    with pytest.raises(ValueError, match=r"1 of 1 samples were left out: 'a': there is no caption beside 'a.mp4'"):
        scan(tmp_path)


def test_captions_alone(tmp_path):
    write(tmp_path, "a.txt", "a text")
    (found,), _ = scan(tmp_path, text_only=True)
    assert (found.name, found.clips[0].path, found.clips[0].caption) == ("a", None, "a text")


def test_captions_without_a_clip_are_none_where_there_are_clips(tmp_path):
    for name in ("a.mp4", "a.txt", "LICENSE.txt", "more/urls.txt"):
        write(tmp_path, name, "a text")
    samples, skipped = scan(tmp_path, text_only=True)
    assert [found.name for found in samples] == ["a"] and list(skipped) == ["LICENSE", "more/urls"]


def test_linked_folders_are_read_and_each_folder_once(tmp_path):
    """A link may lead out of the set, into it, to what has been read, and around in circles."""
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for folder, name in ((root, "own/a"), (elsewhere, "b"), (elsewhere, "deep/c")):
        write(folder, f"{name}.mp4")
        write(folder, f"{name}.txt", "a text")
    for link, target in {
        root / "again": root / "own",
        root / "own" / "around": root,
        root / "more": elsewhere,
        elsewhere / "back": root,
        root / "nowhere": tmp_path / "missing",
    }.items():
        link.symlink_to(target)
    samples, skipped = scan(root)
    assert [found.name for found in samples] == ["more/b", "more/deep/c", "own/a"] and skipped == {}
    assert samples[0].clips[0].path == root / "more" / "b.mp4"


def test_a_dataset(tmp_path):
    for number in (10, 9):
        write_video(tmp_path / f"{number}.mp4", gray_frames(21, number))
        write(tmp_path, f"{number}.txt", f"number {number}")
    data = VideoDataset(tmp_path, num_latent_frames=6, chunk_size=2, height=SIDE, width=SIDE, progress=False)
    assert data.names == ["9", "10"]
    assert data[0]["prompts"] == ["number 9"] * 3 and data[0]["pixels"].shape == (3, 21, SIDE, SIDE)


def test_every_container(tmp_path):
    for suffix in VIDEO_SUFFIXES:
        write_in_container(tmp_path / f"in {suffix[1:]}{suffix}", gray_frames(21, 5))
        write(tmp_path, f"in {suffix[1:]}.txt", "a text")
    data = VideoDataset(tmp_path, num_latent_frames=6, chunk_size=2, height=SIDE, width=SIDE, progress=False)
    assert data.skipped == {} and len(data) == len(VIDEO_SUFFIXES)
    for item in data:
        assert frame_numbers(item["pixels"]) == list(range(5, 26)), item["name"]


@pytest.mark.parametrize("layout", ["flat", "shots"])
def test_captions_in_files_have_no_column(tmp_path, layout):
    if layout == "flat":
        (tmp_path / "fox.txt").write_text("A fox")
    else:
        (tmp_path / "caption" / "fox").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--caption_column label: '.*' has captions in files, and no list"):
        scan(tmp_path, text_only=True, caption_column="label")
