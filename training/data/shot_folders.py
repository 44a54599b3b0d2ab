"""A training set with a folder of clips for each sample, which is the layout of LongLive-2.0.

    ROOT/video/<sample>/1.mp4, 2.mp4, ...           one clip for each shot, in natural order of their names
    ROOT/caption/<sample>/1.json, 2.json, ...       {"caption": "..."}, for the clip of the same name
    ROOT/caption/<sample>/shot_durations.txt        optional: chunks of each shot, whole numbers separated by
                                                    spaces, commas or newlines (it may also be in the
                                                    folder of the clips)

There is one addition to it: `"cut": false` beside a caption says that its clip continues where the one before ended.
It is a new prompt within a shot, not a new shot. (The first clip opens the video in any case.)
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.captions import read_caption
from data.names import by_plain_name, natural_order, plain_name, visible
from data.samples import VIDEO_SUFFIXES, Clip, Sample, SampleError


DURATIONS_FILE = "shot_durations.txt"


def candidates(root: Path, text_only: bool) -> dict[str, Callable[[], Sample]]:
    """
    Return the functions that read the samples, by the names of the samples, in natural order.

    Raises:
        ValueError: If there is no folder of clips, or there are no folders of samples.
    """
    captions = _subfolders(root / "caption")
    videos = {} if text_only else _subfolders(root / "video")
    names = sorted(captions.keys() | videos.keys(), key=natural_order)
    if not names:
        raise ValueError(f"'{root / 'caption'}' has no folders, of which a training set has one for each sample")
    return {name: partial(_read, name, captions.get(name, []), videos.get(name, []), text_only) for name in names}


def _subfolders(folder: Path) -> dict[str, list[Path]]:
    """Return the folders in a folder by their plain names; more than one where accents are written in two ways."""
    if not folder.is_dir():
        raise ValueError(f"A training set that has a folder of captions needs '{folder}', but there is none")
    found: dict[str, list[Path]] = {}
    for path in visible(folder):
        if path.is_dir():
            found.setdefault(plain_name(path.name), []).append(path)
    return found


def _read(name: str, caption_folders: list[Path], video_folders: list[Path], text_only: bool) -> Sample:
    if not text_only and not video_folders:
        raise SampleError("it has captions, but no folder of clips")
    if not caption_folders:
        raise SampleError("it has clips, but no folder of captions")
    if len(caption_folders) > 1 or len(video_folders) > 1:
        raise SampleError("two folders have this name, with accents that are encoded in different ways")
    captions = _files(caption_folders[0], (".json",))
    clips = dict.fromkeys(captions) if text_only else _files(video_folders[0], VIDEO_SUFFIXES)
    if not clips:
        raise SampleError("it has 0 captions" if text_only else f"it has 0 clips{_other_files(video_folders[0])}")
    if missing := clips.keys() - captions.keys():
        raise SampleError(f"{len(missing)} caption(s) are missing: {_listed(missing)}")
    if missing := captions.keys() - clips.keys():
        others = _other_files(video_folders[0])
        raise SampleError(f"{len(missing)} clip(s) are missing: {_listed(missing)}{others}")
    read = [Clip(path, *read_caption(captions[stem])) for stem, path in clips.items()]
    read[0] = Clip(read[0].path, read[0].caption)
    return Sample(name, tuple(read), _read_durations([*caption_folders, *video_folders], len(read)))


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the files with one of the suffixes, by their plain names without suffix, in natural order."""
    paths = [path for path in visible(folder) if path.suffix.lower() in suffixes]
    files = by_plain_name(path for path in paths if path.is_file())
    for same in files.values():
        if len(same) > 1:
            raise SampleError(f"'{same[0].name}' and '{same[1].name}' have one name")
    return {stem: same[0] for stem, same in files.items()}


def _other_files(folder: Path) -> str:
    """Name the files in a folder of clips that are no clips, as the reason why clips are missing."""
    others = [path.name for path in visible(folder) if path.suffix.lower() not in VIDEO_SUFFIXES]
    if not others:
        return ""
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f" (there is {', '.join(others[:3])}{more}, but clips are {', '.join(VIDEO_SUFFIXES)})"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names, key=natural_order))


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
