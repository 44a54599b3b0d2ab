"""The folder of a training set: the samples in it, what their clips show, and why other samples cannot be used.

    ROOT/video/<sample>/000001.mp4, 000002.mp4, ...   one clip for each shot, in the order of their names
    ROOT/caption/<sample>/000001.json                 {"caption": "..."}, for the clip of the same name
    ROOT/caption/<sample>/shot_durations.txt          optional: chunks of each shot, whole numbers separated by
                                                      spaces, commas or newlines (it may also be in the
                                                      folder of the clips)

This is the layout of LongLive-2.0, with one addition: `"cut": false` beside a caption says that its clip continues
where the one before ended. It is a new prompt within a shot, not a new shot. (The first clip opens the video in any
case.)
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path


VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")
DURATIONS_FILE = "shot_durations.txt"


@dataclass(frozen=True)
class Clip:
    """
    Args:
        path: The video file; None in a text-only training set.
        caption: The description of what it shows.
        cut: Whether it begins a shot; False if it continues the clip before under a new prompt.
    """

    path: Path | None
    caption: str
    cut: bool = True


@dataclass(frozen=True)
class Sample:
    """
    Args:
        name: The name of its folder.
        clips: Its clips, in order.
        durations: The length of each clip in chunks; None if none are given.
    """

    name: str
    clips: tuple[Clip, ...]
    durations: tuple[int, ...] | None = None


class SampleError(ValueError):
    """One sample cannot be used. It is left out; the others are used."""


def scan(root: str | os.PathLike, *, text_only: bool = False) -> tuple[list[Sample], dict[str, str]]:
    """
    Find the samples of a training set. Files are listed and captions read; no video is opened.

    Args:
        root: The folder that holds `video/` and `caption/`.
        text_only: Whether to read only the captions; `video/` need not exist then.

    Returns:
        The complete samples, in the order of their names; and what is wrong with each of the others, by name.

    Raises:
        ValueError: If there is no such folder, or no complete sample in it.
    """
    root = Path(root).expanduser()
    captions = _subfolders(root / "caption")
    videos = {} if text_only else _subfolders(root / "video")
    samples, skipped = [], {}
    for name in sorted(captions.keys() | videos.keys()):
        try:
            if not text_only and name not in videos:
                raise SampleError("it has captions, but no folder of clips")
            if name not in captions:
                raise SampleError("it has clips, but no folder of captions")
            samples.append(_read_sample(name, captions[name], videos.get(name)))
        except SampleError as error:
            skipped[name] = str(error)
    if not samples:
        raise ValueError(f"'{root}' has no sample that can be used; {describe_skipped(skipped, len(skipped))}")
    return samples, skipped


def describe_skipped(skipped: dict[str, str], total: int, limit: int = 20) -> str:
    """Say in one line how many of `total` samples were left out, and why for the first `limit` of them."""
    if not skipped:
        return f"{total} samples were found"
    named = [f"'{name}': {reason}" for name, reason in list(skipped.items())[:limit]]
    more = f"; and {len(skipped) - limit} more" if len(skipped) > limit else ""
    return f"{len(skipped)} of {total} samples were left out: {'; '.join(named)}{more}"


def _subfolders(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"A training set needs the folder '{folder}', but there is none")
    return {path.name: path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the files with one of the suffixes, by their names without suffix, in order; hidden files are ignored."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes or not path.is_file():
            continue
        if path.stem in files:
            raise SampleError(f"'{files[path.stem].name}' and '{path.name}' have one name")
        files[path.stem] = path
    return files


def _read_sample(name: str, caption_folder: Path, video_folder: Path | None) -> Sample:
    captions = _files(caption_folder, (".json",))
    clips = dict.fromkeys(captions) if video_folder is None else _files(video_folder, VIDEO_SUFFIXES)
    if not clips:
        raise SampleError(f"it has 0 {'captions' if video_folder is None else 'clips'}")
    for kind, missing in (("caption", clips.keys() - captions.keys()), ("clip", captions.keys() - clips.keys())):
        if missing:
            raise SampleError(f"{len(missing)} {kind}(s) are missing: {', '.join(sorted(missing))}")
    read = [Clip(path, *_read_caption(captions[stem])) for stem, path in clips.items()]
    read[0] = Clip(read[0].path, read[0].caption)
    folders = [caption_folder] if video_folder is None else [caption_folder, video_folder]
    return Sample(name, tuple(read), _read_durations(folders, len(read)))


def _read_caption(path: Path) -> tuple[str, bool]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SampleError(f"'{path.name}' is not JSON in UTF-8: {error}") from error
    except OSError as error:
        raise SampleError(f"'{path.name}' cannot be read: {error.strerror}") from error
    if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
        raise SampleError(f"'{path.name}' has no text named 'caption'")
    caption, cut = content["caption"].strip(), content.get("cut", True)
    if not caption:
        raise SampleError(f"the caption in '{path.name}' is empty")
    if not caption.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise SampleError(f"the caption in '{path.name}' is no text: it has half of a surrogate pair")
    if not isinstance(cut, bool):
        raise SampleError(f"'cut' in '{path.name}' must be true or false, but it is {cut!r}")
    return caption, cut


def _read_durations(folders: list[Path], num_clips: int) -> tuple[int, ...] | None:
    path = next((folder / DURATIONS_FILE for folder in folders if (folder / DURATIONS_FILE).is_file()), None)
    if path is None:
        return None
    try:
        words = path.read_text(encoding="utf-8-sig").replace(",", " ").split()
    except (UnicodeDecodeError, OSError) as error:
        raise SampleError(f"'{path.name}' cannot be read: {error}") from error
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) < 10 and int(word) >= 1):
            raise SampleError(f"'{path.name}' must hold whole numbers of at least 1, but it has {word[:20]!r}")
    if len(words) != num_clips:
        raise SampleError(f"'{path.name}' has {len(words)} durations for {num_clips} clips")
    return tuple(map(int, words))
