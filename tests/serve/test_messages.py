"""What a client may say: every field with its limits, and everything else is refused in words."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlive_diffusers.cli.choices import MAX_STEPS
from longlive_diffusers.serve import messages
from longlive_diffusers.serve.messages import (
    MAX_PROMPT,
    Blend,
    Chunk,
    Cut,
    End,
    Error,
    Pause,
    Played,
    Prompt,
    Resume,
    Start,
    Stop,
    parse_message,
    to_json,
)


RIGHT = {
    '{"type": "start", "prompt": "a"}': Start("a"),
    '{"type": "start", "prompt": "a", "seed": null}': Start("a"),
    json.dumps(
        {
            "type": "start",
            "prompt": "ä 視",
            "seed": 2**63 - 1,
            "steps": 2,
            "guidance_scale": 2,
            "height": 64,
            "width": 32,
            "seconds": 0.5,
            "image": "data:image/png;base64,AAAA",
            "video": "jpeg",
        }
    ): Start("ä 視", 2**63 - 1, 2, 2, 64, 32, 0.5, "data:image/png;base64,AAAA", "jpeg"),
    '{"type": "prompt", "prompt": "b"}': Prompt("b"),
    '{"type": "cut", "prompt": "b"}': Cut("b"),
    '{"type": "blend", "prompt": "b"}': Blend("b", 4),
    '{"type": "blend", "prompt": "b", "chunks": 2}': Blend("b", 2),
    '{"type": "pause"}': Pause(),
    '{"type": "resume"}': Resume(),
    '{"type": "played", "frame": 0}': Played(0),
    '{"type": "stop"}': Stop(),
}
WRONG = {
    "": "This message is not JSON: ''.",
    "{": "This message is not JSON: '{'.",
    "[" * 100_000: "This message is nested too deeply.",
    "9" * 5000: "This message is not JSON",
    "null": "A message is a JSON object with a type, not null.",
    "[]": "A message is a JSON object with a type, not [].",
    "{}": "The type of a message is one of start, prompt, cut, blend, pause, resume, played, stop, not null.",
    '{"type": ["start"]}': 'not ["start"].',
    '{"type": "Start"}': "not 'Start'.",
    '{"type": "start"}': "A message of type start needs a field prompt.",
    '{"type": "start", "prompt": null}': "A message of type start needs a field prompt.",
    '{"type": "start", "prompt": " "}': "prompt is empty.",
    '{"type": "start", "prompt": ["a"]}': "prompt must be text.",
    '{"type": "start", "prompt": "\\ud800"}': "prompt must be Unicode text, and has a lone surrogate.",
    json.dumps({"type": "prompt", "prompt": "a" * (MAX_PROMPT + 1)}): "has 4001 characters; at most 4000 are allowed.",
    '{"type": "start", "prompt": "a", "seed": -1}': "seed must be an integer from 0 to 9223372036854775807, not -1.",
    '{"type": "start", "prompt": "a", "seed": true}': "not true.",
    '{"type": "start", "prompt": "a", "steps": 1.5}': "steps must be an integer from 1 to 1000, not 1.5.",
    '{"type": "start", "prompt": "a", "seconds": 0}': "seconds must be a number above 0 and at most 86400, not 0.",
    '{"type": "start", "prompt": "a", "seconds": NaN}': "This message is not JSON",
    '{"type": "start", "prompt": "a", "seconds": 1e999}': "not Infinity.",
    '{"type": "start", "prompt": "a", "guidance_scale": "2"}': "must be a number from 0 to 1000, not '2'.",
    '{"type": "start", "prompt": "a", "guidance_scale": ' + "9" * 400 + "}": "guidance_scale must be a number",
    '{"type": "start", "prompt": "a", "video": "webm"}': "video must be one of mp4, jpeg, not 'webm'.",
    '{"type": "start", "prompt": "a", "image": "http://example.com/a.png"}': "image must be a data URL",
    json.dumps(
        {"type": "start", "prompt": "a", "image": "data:image/png;base64," + "A" * 14_000_000}
    ): "at most 10 MiB",
    '{"type": "start", "prompt": "a", "promt": "b"}': "A message of type start has no field 'promt'; its fields are",
    '{"type": "pause", "now": true}': "A message of type pause has no field 'now'; it has no fields.",
    '{"type": "blend", "prompt": "a", "chunks": 17}': "chunks must be an integer from 1 to 16, not 17.",
    '{"type": "played", "frame": -1}': "frame must be an integer from 0 to",
    '{"type": "played"}': "A message of type played needs a field frame.",
    '["\\ud800"]': 'A message is a JSON object with a type, not ["\\ud800"].',  # half of a character
    '{"type": ["視\\ud800"]}': 'not ["視\\ud800"].',
    '{"type": "\\udfff"}': "not '\\udfff'.",
    '{"type": "start", "prompt": "a", "seed": {"\\ud800": 1}}': 'not {"\\ud800": 1}.',
    '{"type": "start", "prompt": "a", "seconds": "\\ud800"}': "not '\\ud800'.",
    '{"type": "start", "prompt": "a", "\\ud800": 1}': "has no field '\\ud800'",
}


@pytest.mark.parametrize("text", RIGHT, ids=lambda text: text[:60])
def test_messages_are_read(text: str) -> None:
    assert parse_message(text) == RIGHT[text]


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:60])
def test_what_is_no_message_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_message(text)
    assert WRONG[text] in str(error.value)
    assert len(str(error.value)) < 300  # whatever was sent
    assert to_json(Error(str(error.value))).encode()


@pytest.mark.parametrize("message", ["%s", '{"type": %s}', '{"type": "start", "prompt": "a", "seed": %s}'])
def test_any_depth_is_refused_in_words(message: str) -> None:
    """Some messages are just shallow enough to be read, and too deep to be written again."""
    for depth in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit() + 1):
        with pytest.raises(ValueError):
            parse_message(message % (depth * "[" + depth * "]"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
NAMES = st.sampled_from(["type", "prompt", "seed", "steps", "frame", "chunks", "image", "video", "seconds"])
KINDS = st.sampled_from(["start", "prompt", "cut", "blend", "pause", "resume", "played", "stop"])


@given(st.text() | st.dictionaries(NAMES | st.text(), VALUES | KINDS).map(json.dumps))
def test_anything_else_is_a_message_or_a_value_error(text: str) -> None:
    try:
        message = parse_message(text)
    except ValueError as error:
        assert to_json(Error(str(error))).encode()
    else:
        assert type(message) in (Start, Prompt, Cut, Blend, Pause, Resume, Played, Stop)


def test_what_the_server_says() -> None:
    chunk = Chunk(2, 1, "視", 13, 8, 0.25, 0.5)
    assert json.loads(to_json(chunk)) == {
        "type": "chunk",
        "index": 2,
        "shot_index": 1,
        "prompt": "視",
        "start_frame": 13,
        "num_frames": 8,
        "denoise_seconds": 0.25,
        "decode_seconds": 0.5,
    }
    assert json.loads(to_json(End("stopped", 5)))["reason"] == "stopped"


def test_limits_are_those_of_the_command_line() -> None:
    assert messages.MAX_STEPS == MAX_STEPS
