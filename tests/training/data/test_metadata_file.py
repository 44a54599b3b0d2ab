"""A list of clips with captions: each line is a sample, and what is wrong with a line is said of that line."""

import json
import unicodedata

import pytest

from data.clips import scan


def write(root, lines, name="metadata.jsonl", clips=("a.mp4", "b.mp4")) -> None:
    root.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / name).write_text("\n".join(texts), encoding="utf-8")
    for clip in clips:
        (root / clip).parent.mkdir(exist_ok=True)
        (root / clip).touch()


def found(root, **arguments) -> list[tuple]:
    samples, skipped = scan(root, **arguments)
    assert skipped == {}
    return [(sample.name, *((clip.path, clip.caption) for clip in sample.clips)) for sample in samples]


@pytest.mark.parametrize("column", ["caption", "text", "prompt"])
def test_the_order_is_that_of_the_list_and_other_columns_are_ignored(tmp_path, column):
    rows = [{"file_name": name, column: f" of {name} ", "fps": 24, "tags": ["x"]} for name in ("b.mp4", "clips/1.avi")]
    write(tmp_path, ["", rows[0], "   ", rows[1], ""], clips=("a.mp4", "b.mp4", "clips/1.avi"))
    assert found(tmp_path) == [
        ("b", (tmp_path / "b.mp4", "of b.mp4")),
        ("clips/1", (tmp_path / "clips/1.avi", "of clips/1.avi")),
    ]
    assert found(tmp_path, text_only=True)[0] == ("b", (None, "of b.mp4"))


def test_csv(tmp_path):
    write(tmp_path, ["\ufefffile_name,text,more", 'b.mp4,"a fox,\nin the snow",1', "a.mp4,一只猫,2"], "metadata.csv")
    assert found(tmp_path) == [
        ("b", (tmp_path / "b.mp4", "a fox,\nin the snow")),
        ("a", (tmp_path / "a.mp4", "一只猫")),
    ]


def test_a_column_may_be_named(tmp_path):
    write(tmp_path, [{"file_name": "a.mp4", "caption": "short", "text": "long", "beschreibung": "ein Bär"}])
    with pytest.raises(ValueError, match=r"line 1 has more than one caption \(caption, text\): .* --caption_column"):
        scan(tmp_path)
    assert found(tmp_path, caption_column="text")[0][1][1] == "long"
    assert found(tmp_path, caption_column="beschreibung")[0][1][1] == "ein Bär"
    with pytest.raises(ValueError, match=r"line 1 has no caption \(it has file_name, caption, text, beschreibung\)"):
        scan(tmp_path, caption_column="captions")


def test_a_clip_may_be_anywhere_and_be_listed_twice(tmp_path):
    write(tmp_path / "elsewhere", [])
    outside = str(tmp_path / "elsewhere" / "a.mp4")
    rows = [{"file_name": outside, "text": "one"}, {"file_name": "a.mp4", "text": "two"}]
    write(tmp_path / "set", [*rows, {"file_name": "a.mp4", "text": "three"}])
    samples, _ = scan(tmp_path / "set")
    assert [sample.name for sample in samples] == [outside.removesuffix(".mp4"), "a", "a (line 3)"]
    assert samples[1].clips[0].path == samples[2].clips[0].path


def test_accents(tmp_path):
    write(tmp_path, [{"file_name": "é.mp4", "text": "one"}], clips=(unicodedata.normalize("NFD", "é.mp4"),))
    assert found(tmp_path)[0][0] == "é"


@pytest.mark.parametrize(
    ("line", "name", "reason"),
    [
        ("{", "line 2", "line 2 of 'metadata.jsonl' is not JSON"),
        ("[" * 100_000, "line 2", "line 2 of 'metadata.jsonl' is nested too deeply"),
        ("9" * 5000, "line 2", "line 2 of 'metadata.jsonl' has a number of too many digits"),
        ("[1]", "line 2", "line 2 must be an object with 'file_name' and a caption, but it is [1]"),
        ('"a.mp4"', "line 2", "line 2 must be an object"),
        (
            {"filename": "b.mp4", "text": "one"},
            "line 2",
            "does not name its clip as 'file_name' (it has filename, text)",
        ),
        ({"file_name": None, "text": "one"}, "line 2", "line 2 must name its clip as 'file_name', but that is None"),
        ({"file_name": 3, "text": "one"}, "line 2", "but that is 3"),
        ({"file_name": "", "text": "one"}, "line 2", "but that is ''"),
        ({"file_name": "b.mp4"}, "b", "line 2 has no caption (it has file_name)"),
        ({"file_name": "b.mp4", "text": ["one"]}, "b", "the caption in line 2 must be a text, but it is ['one']"),
        ({"file_name": "b.mp4", "text": None}, "b", "the caption in line 2 must be a text, but it is None"),
        ({"file_name": "b.mp4", "text": " "}, "b", "the caption in line 2 is empty"),
        ({"file_name": "c.mp4", "text": "one"}, "c", "there is no file 'c.mp4', which line 2 names"),
        ({"file_name": ".", "text": "one"}, ".", "there is no file '.', which line 2 names"),
        ({"file_name": "a\0.mp4", "text": "one"}, "a\0", "there is no file 'a\\x00.mp4'"),
        ({"file_name": "\ud800.mp4", "text": "one"}, r"\ud800", "there is no file '\\ud800.mp4'"),
        ({"file_name": "x" * 5000, "text": "one"}, "x" * 5000, "there is no file 'xxxx"),
    ],
    ids=lambda value: str(value)[:40].replace("\0", "0").encode("ascii", "backslashreplace").decode(),
)
def test_a_line_that_cannot_be_used_is_named_and_the_others_are_used(tmp_path, line, name, reason):
    write(tmp_path, [{"file_name": "a.mp4", "text": "one"}, line])
    samples, skipped = scan(tmp_path)
    assert [sample.name for sample in samples] == ["a"]
    assert list(skipped) == [name] and reason in skipped[name]


def test_lists_that_cannot_be_read(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}')
    with pytest.raises(ValueError, match=r"metadata.jsonl' cannot be read as a list of clips in UTF-8"):
        scan(tmp_path)
    write(tmp_path, [])
    with pytest.raises(ValueError, match="has no sample that can be used; 0 samples were found"):
        scan(tmp_path)
    write(tmp_path, ["file_name,text"], "metadata.csv")
    with pytest.raises(ValueError, match=r"has both metadata.jsonl and metadata.csv: remove one"):
        scan(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    write(tmp_path, ["file_name,text", '"a.mp4"x,one'], "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata.csv' cannot be read as a list of clips"):
        scan(tmp_path)
    write(tmp_path, ["file_name,text", "a.mp4"], "metadata.csv")
    with pytest.raises(ValueError, match="the caption in line 2 must be a text, but it is None"):
        scan(tmp_path)


def test_a_list_in_a_folder_below_is_pointed_out(tmp_path):
    write(tmp_path / "train", [{"file_name": "a.mp4", "text": "one"}])
    with pytest.raises(ValueError, match=r"has no list of clips, but '.*train' has: give that folder"):
        scan(tmp_path)
