"""A training set that is a list of clips with captions, as `videofolder` data sets of Hugging Face are.

    ROOT/metadata.jsonl             {"file_name": "fox.mp4", "caption": "A fox in the snow"}     in each line
    ROOT/metadata.csv               file_name,caption                                            and a line for each

Each line is a sample. Clips are named relative to ROOT; other columns are ignored.
"""

import csv
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data.captions import caption_of, shortened
from data.names import find_file, plain_name
from data.samples import Clip, Sample, SampleError
from longlive_diffusers.json_files import parse_json


METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("caption", "text", "prompt")
FILE_COLUMN = "file_name"


def find(root: Path) -> Path | None:
    """
    Return the list of clips of a folder, if it has one.

    Raises:
        ValueError: If it has two; or it has none, but a folder in it does, so that it is not clear what is meant.
    """
    found = [root / name for name in METADATA_FILES if (root / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"'{root}' has both {' and '.join(path.name for path in found)}: remove one")
    deeper = [path for name in METADATA_FILES for path in sorted(root.glob(f"*/{name}"))]
    if not found and deeper:
        raise ValueError(f"'{root}' has no list of clips, but '{deeper[0].parent}' has: give that folder")
    return found[0] if found else None


def candidates(path: Path, text_only: bool, caption_column: str | None) -> dict[str, Callable[[], Sample]]:
    """
    Return the functions that read the samples of a list, by the names of the samples, in the order of the list.

    Raises:
        ValueError: If the file is not text in UTF-8, or not CSV.
    """
    found: dict[str, Callable[[], Sample]] = {}
    try:
        for place, row in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
            name = sample_name(row, place)
            name = name if name not in found else f"{name} ({place})"
            found[name] = partial(_read, name, row, place, path.parent, text_only, caption_column)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{path}' cannot be read as a list of clips in UTF-8: {error}") from error
    return found


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield each line's place and value; a line that is not JSON is yielded as the error that says why."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", parse_json(line)
                except ValueError as error:
                    yield f"line {number}", SampleError(f"line {number} of '{path.name}' {error}")


def _csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        for row in rows:
            yield f"line {rows.line_num}", row


def sample_name(row: object, place: str) -> str:
    """Return the name of the sample in a row: that of its clip, or the row's place if it names none."""
    file_name = row.get(FILE_COLUMN) if isinstance(row, dict) else None
    if not isinstance(file_name, str) or not file_name:
        return place
    return plain_name(os.path.splitext(file_name)[0])


def _read(name: str, row: object, place: str, root: Path, text_only: bool, caption_column: str | None) -> Sample:
    if isinstance(row, SampleError):
        raise row
    if not isinstance(row, dict):
        raise SampleError(f"{place} must be an object with '{FILE_COLUMN}' and a caption, but it is {shortened(row)}")
    clip = None if text_only else _clip(row, place, root)
    caption = caption_of(row[find_caption_column(row, place, caption_column)], place)
    return Sample(name, (Clip(clip, caption),))


def find_caption_column(row: dict, place: str, wanted: str | None) -> str:
    """
    Return the name of the caption in a row: the one that is wanted, or else the usual name that it has.

    Raises:
        SampleError: If it has none of them, or more than one.
    """
    found = [column for column in ((wanted,) if wanted else CAPTION_COLUMNS) if column in row]
    if len(found) != 1:
        problem = f"more than one caption ({', '.join(found)})" if found else f"no caption (it has {_columns(row)})"
        raise SampleError(f"{place} has {problem}: name the column with --caption_column")
    return found[0]


def _clip(row: dict, place: str, root: Path) -> Path:
    if FILE_COLUMN not in row:
        raise SampleError(f"{place} does not name its clip as '{FILE_COLUMN}' (it has {_columns(row)})")
    file_name = row[FILE_COLUMN]
    if not isinstance(file_name, str) or not file_name:
        raise SampleError(f"{place} must name its clip as '{FILE_COLUMN}', but that is {shortened(file_name)}")
    path = find_file(root, file_name)
    if path is None:
        raise SampleError(f"there is no file {shortened(file_name, 200)}, which {place} names, in '{root}'")
    return path


def _columns(row: dict) -> str:
    return ", ".join(str(column) for column in row)
