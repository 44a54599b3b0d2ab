"""Files that list the shots of a video."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..user_path import user_path
from .choices import MAX_CHUNKS


FORMAT = """\
A shots file lists the shots of one video, in order, as text or as JSON. A duration is a number of chunks (of 2 to 8
latent frames, as the model says; each latent frame is 4 frames). Either all shots have one, or none: then the video is
divided evenly.

  text: one shot on each line; empty lines and lines that begin with # are skipped
    [3] A fox runs through the forest.
    [2] It drinks from a river.

  JSON: a list
    [{"prompt": "A fox runs through the forest.", "chunks": 3}, {"prompt": "It drinks from a river.", "chunks": 2}]
"""
_JSON_START = re.compile(r"\s*(\[\s*[\]{\"\[]|\{)")


@dataclass(frozen=True)
class RequestedShot:
    """What the user asks a shot to show, and for how many chunks; None if the video is divided evenly."""

    prompt: str
    chunks: int | None = None


def read_shots(path: str | os.PathLike) -> list[RequestedShot]:
    """Read the shots of a file in the format above.

    Raises:
        ValueError: If there is no such file, or it has no shots, a malformed one (the message names its line, or its
            number in a JSON list), or some with and some without a duration.
    """
    path = user_path(path)
    if not path.exists():
        raise ValueError(f"there is no shots file '{path}'")
    if path.is_dir():
        raise ValueError(f"the shots file '{path}' is a folder")
    try:
        text = path.read_text(encoding="utf-8-sig")  # of a pipe as well
    except UnicodeDecodeError as error:
        raise ValueError(f"the shots file '{path}' is not UTF-8 text: {error}") from error
    is_json = path.suffix.lower() == ".json" or _JSON_START.match(text)
    shots = _parse_json(text, path) if is_json else _parse_lines(text, path)
    if not shots:
        raise ValueError(f"the shots file '{path}' has no shots")
    without = [place for place, shot in shots if shot.chunks is None]
    if without and len(without) < len(shots):
        raise ValueError(f"'{path}', {without[0]}: no duration, but other shots have one; give it to all or to none")
    return [shot for _, shot in shots]


def parse_shot(line: str) -> RequestedShot:
    """Read a shot as the text format has it, `[3] A fox runs.` or without a duration.

    Raises:
        ValueError: If the duration is not a whole number of chunks, or there is no prompt behind it.
    """
    chunks, prompt = None, line.strip()
    if prompt.startswith("[") and "]" in prompt:
        chunks, _, prompt = (part.strip() for part in prompt[1:].partition("]"))
    if chunks is not None and not (chunks.isdecimal() and len(chunks) < 10 and 0 < int(chunks) <= MAX_CHUNKS):
        raise ValueError(f"a shot lasts a whole number of chunks, from 1 to {MAX_CHUNKS}, not '[{chunks}]'")
    if not prompt:
        raise ValueError("there is no prompt" if chunks is None else f"there is no prompt after '[{chunks}]'")
    return RequestedShot(prompt, None if chunks is None else int(chunks))


def _parse_lines(text: str, path: Path) -> list[tuple[str, RequestedShot]]:
    shots = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        place = f"line {number}"
        try:
            shots.append((place, parse_shot(line)))
        except ValueError as error:
            raise ValueError(f"'{path}', {place}: {error}") from error
    return shots


def _parse_json(text: str, path: Path) -> list[tuple[str, RequestedShot]]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}', line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"'{path}' is not a list of shots: it is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"'{path}' holds a number that is too large") from error
    if not isinstance(entries, list):
        raise ValueError(f"'{path}' holds a JSON {type(entries).__name__}, not a list of shots")
    return [(f"shot {number}", _parse_entry(entry, path, number)) for number, entry in enumerate(entries, start=1)]


def _parse_entry(entry: object, path: Path, number: int) -> RequestedShot:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ValueError(f"'{path}', shot {number}: not an object with a text as \"prompt\": {json.dumps(entry)}")
    if unknown := sorted(set(entry) - {"prompt", "chunks"}):
        raise ValueError(f"'{path}', shot {number}: no such setting: {', '.join(unknown)}; there is prompt and chunks")
    chunks = entry.get("chunks")
    if chunks is not None and (
        isinstance(chunks, bool) or not isinstance(chunks, int) or not 1 <= chunks <= MAX_CHUNKS
    ):
        raise ValueError(
            f"'{path}', shot {number}: \"chunks\" is not an integer from 1 to {MAX_CHUNKS}: {json.dumps(chunks)}"
        )
    return RequestedShot(entry["prompt"].strip(), chunks)
