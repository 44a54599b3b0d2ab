"""The messages of the WebSocket protocol, in JSON: what a client may say, and what the server answers.

README.md beside this file describes the protocol; here are the fields, their types and their limits, once.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, ClassVar

from ..limits import MAX_BLEND_CHUNKS, MAX_GUIDANCE_SCALE, MAX_SIDE, MAX_STEPS
from ..number_checks import is_finite


MAX_PROMPT = 4000  # characters; the captions that the model learned from have about 1500
MAX_SEED = 2**63 - 1
MAX_SECONDS = 86_400
MAX_IMAGE_BYTES = 10 * 2**20
MEDIA = ("mp4", "jpeg")
SHOWN = 60  # characters of what somebody sent that an answer quotes


# ------------------------------------------------------------------------------------------------- client to server
def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return "must be text"
    if not value.strip():
        return "is empty"
    if len(value) > MAX_PROMPT:
        return f"has {len(value)} characters; at most {MAX_PROMPT} are allowed"
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        return "must be Unicode text, and has a lone surrogate"
    return None


def _integer(least: int, most: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return None if right else f"must be an integer from {least} to {most}, not {_quoted(value)}"

    return check


def _number(least: float, most: float, *, above: bool = False) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        right = isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
        if right and least <= value <= most and not (above and value == least):
            return None
        limits = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
        return f"must be a number {limits}, not {_quoted(value)}"

    return check


def _image(value: Any) -> str | None:
    if not isinstance(value, str) or not value.startswith("data:image/") or ";base64," not in value[:64]:
        return "must be a data URL of an image in base64, which begins with data:image/"
    most = 4 * -(-MAX_IMAGE_BYTES // 3) + 64
    return None if len(value) <= most else f"must be an image of at most {MAX_IMAGE_BYTES // 2**20} MiB"


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if value in choices else f"must be one of {', '.join(choices)}, not {_quoted(value)}"

    return check


def _checked(check: Callable[[Any], str | None], **options: Any) -> Any:
    """A field of a message, with the function that says what is wrong with a value."""
    return field(metadata={"check": check}, **options)


@dataclass(frozen=True)
class Start:
    """Begin a video. What is left out is the server's to choose."""

    type: ClassVar = "start"
    prompt: str = _checked(_text)
    seed: int | None = _checked(_integer(0, MAX_SEED), default=None)
    steps: int | None = _checked(_integer(1, MAX_STEPS), default=None)
    guidance_scale: float | None = _checked(_number(0, MAX_GUIDANCE_SCALE), default=None)
    height: int | None = _checked(_integer(1, MAX_SIDE), default=None)
    width: int | None = _checked(_integer(1, MAX_SIDE), default=None)
    seconds: float | None = _checked(_number(0, MAX_SECONDS, above=True), default=None)
    image: str | None = _checked(_image, default=None)
    video: str = _checked(_one_of(*MEDIA), default="mp4")


@dataclass(frozen=True)
class Prompt:
    """Go on under another prompt, from the next chunk on."""

    type: ClassVar = "prompt"
    prompt: str = _checked(_text)


@dataclass(frozen=True)
class Cut:
    """Begin a new shot with the next chunk."""

    type: ClassVar = "cut"
    prompt: str = _checked(_text)


@dataclass(frozen=True)
class Blend:
    """Glide from the present prompt to another one, over the next `chunks` chunks."""

    type: ClassVar = "blend"
    prompt: str = _checked(_text)
    chunks: int = _checked(_integer(1, MAX_BLEND_CHUNKS), default=4)


@dataclass(frozen=True)
class Pause:
    """Begin no further chunk."""

    type: ClassVar = "pause"


@dataclass(frozen=True)
class Resume:
    """Go on after a pause."""

    type: ClassVar = "resume"


@dataclass(frozen=True)
class Played:
    """The index of the frame that the viewer sees."""

    type: ClassVar = "played"
    frame: int = _checked(_integer(0, 2**53))


@dataclass(frozen=True)
class Stop:
    """End the video."""

    type: ClassVar = "stop"


FromClient = Start | Prompt | Cut | Blend | Pause | Resume | Played | Stop
_CLIENT_MESSAGES: dict[str, type[FromClient]] = {
    message.type: message for message in (Start, Prompt, Cut, Blend, Pause, Resume, Played, Stop)
}


def parse_message(text: str) -> FromClient:
    """
    Read what a client sent.

    Raises:
        ValueError: If it is not one of the messages; the text says why, and is to be sent back.
    """
    try:
        return _parsed(text)
    except RecursionError:  # of a message that is read, or of a part of it that the answer would quote
        raise ValueError("This message is nested too deeply.") from None


def _parsed(text: str) -> FromClient:
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:  # also of an integer of thousands of digits
        raise ValueError(f"This message is not JSON: {_quoted(text)}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"A message is a JSON object with a type, not {_quoted(values)}.")
    kind = values.pop("type", None)
    message = _CLIENT_MESSAGES.get(kind) if isinstance(kind, str) else None
    if message is None:
        raise ValueError(f"The type of a message is one of {', '.join(_CLIENT_MESSAGES)}, not {_quoted(kind)}.")
    return message(**_checked_values(message.type, fields(message), values))


def _checked_values(kind: str, known: tuple[Field, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    names = [entry.name for entry in known]
    if unknown := [name for name in values if name not in names]:
        there_are = f"its fields are {', '.join(names)}" if names else "it has no fields"
        raise ValueError(f"A message of type {kind} has no field {_quoted(unknown[0])}; {there_are}.")
    checked = {}
    for entry in known:
        value = values.get(entry.name)
        if value is None:  # null stands for a field that is left out
            if entry.default is MISSING:
                raise ValueError(f"A message of type {kind} needs a field {entry.name}.")
            continue
        if complaint := entry.metadata["check"](value):
            raise ValueError(f"{entry.name} {complaint}.")
        checked[entry.name] = value
    return checked


# ------------------------------------------------------------------------------------------------- server to client
@dataclass(frozen=True)
class Queued:
    """The stream waits for others to end; `position` 1 is the next."""

    type: ClassVar = "queued"
    position: int


@dataclass(frozen=True)
class Started:
    """The stream has begun. `mime` is the type of what its binary messages join to."""

    type: ClassVar = "started"
    session: str
    seed: int
    fps: int
    height: int
    width: int
    mime: str


@dataclass(frozen=True)
class Chunk:
    """A chunk is there, or a part of the first one; as many binary messages follow as it has frames."""

    type: ClassVar = "chunk"
    index: int
    shot_index: int
    prompt: str
    start_frame: int
    num_frames: int
    denoise_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Error:
    """What was asked for cannot be done. The stream goes on, unless `end` follows."""

    type: ClassVar = "error"
    message: str


@dataclass(frozen=True)
class End:
    """
    The stream is over, after `num_frames` frames.

    Args:
        reason: "stopped" by the client, "finished" at the length that was asked for, "time" when it lasted as long as
            this server allows, "idle" when it waited for its viewer while others waited for a place, "error" after a
            message that says which, or "server" when the server stops.
        num_frames: How many frames were sent.
        latency: What `longlive_diffusers.latency.Latency` has measured of the stream, as it left the server.
    """

    type: ClassVar = "end"
    reason: str
    num_frames: int
    latency: dict[str, float | None] = field(default_factory=dict)


FromServer = Queued | Started | Chunk | Error | End


def to_json(message: FromServer) -> str:
    """Return a message as it is sent."""
    return json.dumps({"type": message.type, **asdict(message)}, ensure_ascii=False, allow_nan=False)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _quoted(value: Any) -> str:
    """Quote the beginning of what somebody sent."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    shown = repr(text) if isinstance(value, str) else text
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")  # JSON can name halves of characters
