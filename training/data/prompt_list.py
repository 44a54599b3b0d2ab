"""The prompts of a distillation, which needs no videos: what each video is to show, shot by shot.

    ROOT/                   the captions of a training set, in any of its layouts (`layouts.py`)

    prompts.txt             one video on each line; ' | ' separates its shots, which may have durations in chunks
      A fox runs through the forest.
      [3] A fox runs through the forest. | [2] It drinks from a river.

    prompts.jsonl           one video on each line; "cut": false is a new prompt within a shot, not a new shot
      {"prompt": "A fox runs through the forest."}
      {"shots": [{"prompt": "A fox runs.", "chunks": 3}, {"prompt": "It stops.", "chunks": 2, "cut": false}]}

Empty lines and lines that begin with # are skipped. A prompt may also be called `caption` or `text`, as in a list of
clips, whose `file_name` then names the video. Either all shots of a video have a duration, or none has: then the video
is divided evenly.
"""

import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.captions import caption_of, shortened
from data.layouts import scan
from data.metadata_file import CAPTION_COLUMNS, FILE_COLUMN, find_caption_column, sample_name
from data.samples import Sample, describe_skipped
from longlive_diffusers.cli.choices import MAX_CHUNKS
from longlive_diffusers.cli.shots_file import parse_shot
from longlive_diffusers.json_files import parse_json
from longlive_diffusers.number_checks import is_count
from longlive_diffusers.user_path import user_path
from run.cached_prompts import split_shots


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptShot:
    """
    Args:
        prompt: What it shows.
        chunks: Its duration in chunks; None if the video is divided evenly.
        cut: Whether it begins a shot; False if it is a new prompt for the shot before.
    """

    prompt: str
    chunks: int | None = None
    cut: bool = True


@dataclass(frozen=True)
class PromptSample:
    """
    Args:
        name: The name of the video, or where it is in its file.
        shots: Its shots, at least one. The first begins the video, so that its `cut` is True.
    """

    name: str
    shots: tuple[PromptShot, ...]


def read_prompts(source: str | os.PathLike, caption_column: str | None = None) -> list[PromptSample]:
    """
    Read the prompts of all videos in a folder or file of the formats above.

    Args:
        source: The folder or the file.
        caption_column: What prompts are called in a list; None for the usual names.

    Raises:
        ValueError: If there is no such folder or file, it is of another kind, or it has no prompts. Or for a line of a
            file that is not as above; the message names it. (Of a folder, samples without captions that can be read
            are left out, with a warning, as in every training set.)
    """
    path = user_path(source)
    if os.path.isdir(path):
        samples, skipped = scan(path, text_only=True, caption_column=caption_column)
        if skipped:
            logger.warning("'%s': %s", path, describe_skipped(skipped, len(skipped) + len(samples)))
        return [prompts_of(sample) for sample in samples]
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise ValueError(f"There is no folder '{path}', and a file with prompts ends in .txt or .jsonl")
    if suffix == ".txt" and caption_column is not None:
        raise ValueError(f"--caption_column {caption_column}: '{path}' is text, which has no columns")
    parse = _parse_text if suffix == ".txt" else partial(_parse_json, caption_column=caption_column)
    prompts = []
    for number, line in _lines(path):
        try:
            prompts.append(parse(line, number))
        except ValueError as error:
            raise ValueError(f"'{path}', line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"'{path}' has no prompts")
    return prompts


def prompts_of(sample: Sample) -> PromptSample:
    """Return the prompts of a sample of a training set: its captions, with their durations."""
    durations = sample.durations or [None] * len(sample.clips)
    shots = zip(sample.clips, durations, strict=True)
    return PromptSample(sample.name, tuple(PromptShot(clip.caption, chunks, clip.cut) for clip, chunks in shots))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, but those that are empty or comments."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"There is no file '{path}' with prompts") from error
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"'{path}', line {number}: this is not text in UTF-8 ({error.reason})") from error
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):  # not at U+2028, which JSON may hold
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _parse_text(line: str, number: int) -> PromptSample:
    # With blanks around the line, a separator at its beginning or end is one, too: a shot has no prompt there.
    shots = []
    for index, text in enumerate(split_shots(f" {line.strip()} "), start=1):
        try:
            shot = parse_shot(text)
            shots.append(PromptShot(caption_of(shot.prompt, "the line"), shot.chunks))
        except ValueError as error:
            raise ValueError(f"shot {index}: {error}") from error
    return PromptSample(f"line {number}", _checked(shots))


def _parse_json(line: str, number: int, caption_column: str | None) -> PromptSample:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"it {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"it must be an object with a prompt or with shots, but it is {shortened(row)}")
    name = sample_name(row, f"line {number}")
    if "shots" not in row:
        return PromptSample(name, (_shot(row, "the line", (FILE_COLUMN,), caption_column),))
    _check_keys(row, "the line", ("shots", FILE_COLUMN))
    entries = row["shots"]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"'shots' must be a list of at least one shot, but it is {shortened(entries)}")
    shots = [_shot(entry, f"shot {i}", ("chunks", "cut"), caption_column) for i, entry in enumerate(entries, start=1)]
    return PromptSample(name, _checked(shots))


def _shot(entry: object, place: str, others: Sequence[str], caption_column: str | None) -> PromptShot:
    """Read a shot, which may have `others` beside its prompt."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must be an object with a prompt, but it is {shortened(entry)}")
    own = () if caption_column in (None, *CAPTION_COLUMNS) else (caption_column,)
    _check_keys(entry, place, (*CAPTION_COLUMNS, *own, *others))
    prompt = caption_of(entry[find_caption_column(entry, place, caption_column)], place)
    chunks, cut = entry.get("chunks"), entry.get("cut", True)
    if chunks is not None and not (is_count(chunks) and 1 <= chunks <= MAX_CHUNKS):
        raise ValueError(
            f"'chunks' of {place} must be a whole number from 1 to {MAX_CHUNKS}, but it is {shortened(chunks)}"
        )
    if not isinstance(cut, bool):
        raise ValueError(f"'cut' of {place} must be true or false, but it is {shortened(cut)}")
    return PromptShot(prompt, chunks, cut)


def _check_keys(entry: dict, place: str, known: Sequence[str]) -> None:
    unknown = [shortened(key) for key in entry if key not in known]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"{place} has unknown keys: {', '.join(unknown[:3])}{more}; it may have {', '.join(known)}")


def _checked(shots: list[PromptShot]) -> tuple[PromptShot, ...]:
    without = [index for index, shot in enumerate(shots, start=1) if shot.chunks is None]
    if without and len(without) < len(shots):
        raise ValueError(f"shot {without[0]} has no duration, but other shots have one: give it to all or to none")
    return (PromptShot(shots[0].prompt, shots[0].chunks), *shots[1:])  # nothing comes before it that it could continue
