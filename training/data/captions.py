"""Read captions: what a clip shows, as text or as JSON with more beside it."""

from pathlib import Path

from data.samples import SampleError
from longlive_diffusers.json_files import read_json


CAPTION_SUFFIXES = (".json", ".txt")


def read_caption(path: Path) -> tuple[str, bool]:
    """
    Return a caption, and whether its clip begins a shot. A text file holds the caption alone; a JSON file holds
    `{"caption": "..."}`, and perhaps `"cut": false`.

    Raises:
        SampleError: If the file cannot be read, or holds something else.
    """
    if path.suffix.lower() == ".txt":
        return caption_of(_read_text(path), f"'{path.name}'"), True
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise SampleError(f"'{path.name}' {error}") from error
    if not isinstance(content, dict) or "caption" not in content:
        raise SampleError(f"'{path.name}' has no text named 'caption'")
    cut = content.get("cut", True)
    if not isinstance(cut, bool):
        raise SampleError(f"'cut' in '{path.name}' must be true or false, but it is {shortened(cut)}")
    return caption_of(content["caption"], f"'{path.name}'"), cut


def caption_of(value: object, place: str) -> str:
    """
    Return a caption that was found in some place, without blanks around it.

    Raises:
        SampleError: If it is not a text, is empty, or cannot be written down.
    """
    if not isinstance(value, str):
        raise SampleError(f"the caption in {place} must be a text, but it is {shortened(value)}")
    caption = value.strip()
    if not caption:
        raise SampleError(f"the caption in {place} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise SampleError(f"the caption in {place} is no text: it has half of a surrogate pair")
    if "\0" in caption:
        raise SampleError(f"the caption in {place} is no text: it has a zero byte, as UTF-16 has")
    return caption


def shortened(value: object, length: int = 40) -> str:
    """Return a value as it is written in Python, cut off after `length` letters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SampleError(f"'{path.name}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SampleError(f"'{path.name}' is not text in UTF-8: {error}") from error
