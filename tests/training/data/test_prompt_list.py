"""Prompts from files and training sets, and what is said about lines that are no videos."""

import json
from pathlib import Path

import pytest

from data.prompt_list import PromptSample, PromptShot, read_prompts
from tests.support.training_sets import write_captions


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def shots_of(*lines: tuple[PromptShot, ...], start: int = 1) -> list[PromptSample]:
    return [PromptSample(f"line {number}", shots) for number, shots in enumerate(lines, start)]


FOX, RIVER = PromptShot("A fox runs.", 3), PromptShot("It drinks, é 🦊.", 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A fox runs.", shots_of((PromptShot("A fox runs."),))),
        ("[3] A fox runs. | [2] It drinks, é 🦊.", shots_of((FOX, RIVER))),
        ("  [ 3 ]A fox runs.   |   [2]  It drinks, é 🦊.  ", shots_of((FOX, RIVER))),
        ("# a film\n \nA\nB | C\n", shots_of((PromptShot("A"),), (PromptShot("B"), PromptShot("C")), start=3)),
        ("\ufeffA\r\nB\r\n", shots_of((PromptShot("A"),), (PromptShot("B"),))),
        ("A\rB", shots_of((PromptShot("A"),), (PromptShot("B"),))),
        ("a|b || c", shots_of((PromptShot("a|b || c"),))),
        ("A [3] fox\u2028runs #1", shots_of((PromptShot("A [3] fox\u2028runs #1"),))),
        ("[3 A fox", shots_of((PromptShot("[3 A fox"),))),
    ],
)
def test_text(tmp_path, text, expected):
    assert read_prompts(write(tmp_path, "prompts.TXT", text)) == expected


@pytest.mark.parametrize("key", ["prompt", "caption", "text"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_lines(tmp_path, key, end):
    lines = [
        {key: " A fox | runs. "},
        {key: "An owl", "file_name": "birds/owl.v2.mp4"},
        {"shots": [{key: "A fox runs.", "chunks": 3, "cut": False}, {key: "A", "chunks": 1, "cut": False}]},
        {"shots": [{key: "A\u2028fox", "chunks": None}, {key: "B", "cut": True}], "file_name": "b.mp4"},
    ]
    text = "\ufeff" + (end + end).join(json.dumps(line, ensure_ascii=False) for line in lines)
    assert read_prompts(write(tmp_path, "prompts.jsonl", text)) == [
        PromptSample("line 1", (PromptShot("A fox | runs."),)),
        PromptSample("birds/owl.v2", (PromptShot("An owl"),)),
        PromptSample("line 5", (FOX, PromptShot("A", 1, cut=False))),
        PromptSample("b", (PromptShot("A\u2028fox"), PromptShot("B"))),
    ]


def test_a_column_is_chosen(tmp_path):
    lines = '{"caption": "long", "text": "short", "label": "L"}\n{"shots": [{"label": "M", "caption": "N"}]}'
    path = write(tmp_path, "prompts.jsonl", lines)
    chosen = read_prompts(path, caption_column="label")
    assert [sample.shots for sample in chosen] == [(PromptShot("L"),), (PromptShot("M"),)]
    with pytest.raises(ValueError, match=r"prompts.jsonl', line 1: the line has unknown keys: 'label'; it may have "):
        read_prompts(path)


def test_the_captions_of_a_training_set(tmp_path, caplog):
    goes_on = {"caption": "three", "cut": False}
    write_captions(tmp_path, "a", ["one", "two", goes_on])
    write_captions(tmp_path, "b", ["one", goes_on], "4 1")
    write_captions(tmp_path, "c", [""])
    expected = [
        PromptSample("a", (PromptShot("one"), PromptShot("two"), PromptShot("three", cut=False))),
        PromptSample("b", (PromptShot("one", 4), PromptShot("three", 1, cut=False))),
    ]
    assert read_prompts(tmp_path) == read_prompts(str(tmp_path)) == expected
    assert "1 of 3 samples were left out: 'c': " in caplog.text and "is empty" in caplog.text


def test_the_captions_of_a_list_of_clips(tmp_path):
    write(tmp_path, "metadata.jsonl", '{"file_name": "a.mp4", "label": "a fox", "fps": 24}\n')
    assert read_prompts(tmp_path, "label") == [PromptSample("a", (PromptShot("a fox"),))]
    with pytest.raises(ValueError, match=r"no caption.*--caption_column"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A\n[0] B", "line 2: shot 1: a shot lasts a whole number of chunks, from 1 to 10000000, not '[0]'"),
        ("A | [x] B", "line 1: shot 2: a shot lasts a whole number of chunks"),
        ("[10000001] A", "line 1: shot 1: a shot lasts"),
        ("[" + "9" * 5000 + "] A", "line 1: shot 1: a shot lasts"),
        ("[2]", "line 1: shot 1: there is no prompt after '[2]'"),
        ("\n[2] A | B", "line 2: shot 2 has no duration, but other shots have one: give it to all or to none"),
        ("A | | B", "line 1: shot 2: there is no prompt"),
        ("A |", "line 1: shot 2: there is no prompt"),
        ("| A", "line 1: shot 1: there is no prompt"),
        ("|", "line 1: shot 1: there is no prompt"),
        ("A\0B", "line 1: shot 1: the caption in the line is no text: it has a zero byte"),
        (b"A\nB\n\xe9", "line 3: this is not text in UTF-8"),
        (b"\xef\xbb\xbfA\n\xff", "line 2: this is not text in UTF-8"),
        ("A fox".encode("utf-16"), "line 1: this is not text in UTF-8"),
        ("", "has no prompts"),
        ("# nothing\n\n", "has no prompts"),
    ],
)
def test_lines_of_text_that_are_no_videos(tmp_path, text, message):
    path = write(tmp_path, "prompts.txt", text)
    with pytest.raises(ValueError) as raised:
        read_prompts(path)
    assert str(raised.value).startswith(f"'{path}'") and message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 6000


SHOT = '{"prompt": "A"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "A",}', "it is not JSON"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"prompt": ' + "[" * 800 + "]" * 800 + "}", "the caption in the line must be a text, but it is [[[["),
        ('{"prompt": ' + "9" * 5000 + "}", "it has a number of too many digits"),
        ('["A"]', "it must be an object with a prompt or with shots, but it is ['A']"),
        ("3", "it must be an object"),
        ("{}", "the line has no caption (it has )"),
        (
            '{"file_name": "a.mp4"}',
            "the line has no caption (it has file_name): name the column with --caption_column",
        ),
        ('{"prompt": "A", "caption": "B"}', "the line has more than one caption (caption, prompt)"),
        ('{"prompt": " "}', "the caption in the line is empty"),
        ('{"prompt": null}', "the caption in the line must be a text, but it is None"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "a\\u0000b"}', "it has a zero byte"),
        ('{"prompt": "A", "chunks": 3}', "the line has unknown keys: 'chunks'; it may have caption, text, prompt"),
        ('{"prompt": "A", "shot": []}', "the line has unknown keys: 'shot'"),
        ('{"prompt": "A", "a": 1, "b": 1, "c": 1, "d": 1, "e": 1}', "unknown keys: 'a', 'b', 'c' and 2 more;"),
        ('{"prompt": "A", "' + "k" * 900 + '": 1}', "unknown keys: 'kkk"),
        (f'{{"shots": [{SHOT}], "prompt": "A"}}', "the line has unknown keys: 'prompt'; it may have shots, file_name"),
        ('{"shots": []}', "'shots' must be a list of at least one shot, but it is []"),
        (f'{{"shots": {SHOT}}}', "'shots' must be a list of at least one shot"),
        (f'{{"shots": [{SHOT}, "B"]}}', "shot 2 must be an object with a prompt, but it is 'B'"),
        (f'{{"shots": [{SHOT}, {{"chunks": 2}}]}}', "shot 2 has no caption (it has chunks)"),
        (f'{{"shots": [{SHOT}, {{"prompt": ""}}]}}', "the caption in shot 2 is empty"),
        (f'{{"shots": [{SHOT}, {{"prompt": "B", "cuts": true}}]}}', "shot 2 has unknown keys: 'cuts'; it may have"),
        (f'{{"shots": [{SHOT}, {{"prompt": "B", "file_name": "b"}}]}}', "shot 2 has unknown keys: 'file_name'"),
        ('{"shots": [{"prompt": "B", "cut": 0}]}', "'cut' of shot 1 must be true or false, but it is 0"),
        *(
            (
                f'{{"shots": [{{"prompt": "B", "chunks": {chunks}}}]}}',
                "'chunks' of shot 1 must be a whole number from 1",
            )
            for chunks in ("0", "-1", "1.5", "2.0", "true", '"3"', "NaN", "1e999", "10000001", "9" * 400, "[[3]]")
        ),
        (f'{{"shots": [{{"prompt": "B", "chunks": 2}}, {SHOT}]}}', "shot 2 has no duration, but other shots have one"),
    ],
)
def test_lines_of_json_that_are_no_videos(tmp_path, line, message):
    path = write(tmp_path, "prompts.jsonl", f"\n{SHOT}\n{line}\n")
    with pytest.raises(ValueError) as raised:
        read_prompts(path)
    assert str(raised.value).startswith(f"'{path}', line 3: ") and message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "There is no folder '.*missing', and a file with prompts ends in .txt or .jsonl"),
        ("prompts.json", "a file with prompts ends in .txt or .jsonl"),
        ("missing.txt", "There is no file '.*missing.txt' with prompts"),
        ("missing/a.jsonl", "There is no file '.*a.jsonl' with prompts"),
        ("x" * 300 + ".txt", "cannot be read: File name too long"),
        ("prompts.json/a.txt", "cannot be read: Not a directory"),
        ("empty", "'.*empty' is no training set"),
    ],
)
def test_where_there_are_no_prompts(tmp_path, name, message):
    write(tmp_path, "prompts.json", "[]")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_text_has_no_columns(tmp_path):
    with pytest.raises(ValueError, match=r"--caption_column label: .*prompts.txt' is text, which has no columns"):
        read_prompts(write(tmp_path, "prompts.txt", "A"), "label")
