"""A training set of clips with captions beside them; each clip is a sample.

ROOT/fox.mp4, ROOT/fox.txt                      "A fox in the snow"
ROOT/more/owl.mp4, ROOT/more/owl.json           {"caption": "An owl at night"}
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data.captions import CAPTION_SUFFIXES, read_caption
from data.names import natural_order, plain_name
from data.samples import VIDEO_SUFFIXES, Clip, Sample, SampleError


def candidates(root: Path, text_only: bool) -> dict[str, Callable[[], Sample]]:
    """
    Return the functions that read the samples, by the names of the samples, in natural order. If only captions are
    read, there need be no clips; where there are some, other texts are no captions.

    Raises:
        ValueError: If there is neither a clip nor a caption in the folder.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(_files_below(root)):
        inside = path.relative_to(root)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if path.suffix.lower() in (*VIDEO_SUFFIXES, *CAPTION_SUFFIXES) and not is_hidden and path.is_file():
            found.setdefault(plain_name(inside.with_suffix("").as_posix()), []).append(path)
    if not found:
        raise ValueError(
            f"'{root}' is no training set: it has neither 'caption/' and 'video/', nor 'metadata.jsonl', nor clips "
            f"({', '.join(VIDEO_SUFFIXES)}) with captions beside them"
        )
    has_clips = any(path.suffix.lower() in VIDEO_SUFFIXES for paths in found.values() for path in paths)
    read = partial(_read, text_only=text_only, needs_clip=has_clips or not text_only)
    return {name: partial(read, name, found[name]) for name in sorted(found, key=natural_order)}


def _files_below(root: Path) -> Iterator[Path]:
    """Return what is in a folder and all folders below it, also where these are links; of each folder once."""
    seen: set[str] = set()
    waiting = [root]
    while waiting:
        for folder, subfolders, names in os.walk(waiting.pop(0)):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            yield from (Path(folder, name) for name in names)
            # After all that are no links, so that these keep their names.
            waiting += [Path(folder, name) for name in sorted(subfolders) if os.path.islink(Path(folder, name))]


def _read(name: str, paths: list[Path], *, text_only: bool, needs_clip: bool) -> Sample:
    clips = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    captions = [path for path in paths if path.suffix.lower() in CAPTION_SUFFIXES]
    for same in (clips, captions):
        if len(same) > 1:
            raise SampleError(f"'{same[0].name}' and '{same[1].name}' have one name")
    if not captions:
        stem = clips[0].stem
        raise SampleError(f"there is no caption beside '{clips[0].name}', neither '{stem}.txt' nor '{stem}.json'")
    if needs_clip and not clips:
        raise SampleError(f"there is no clip beside '{captions[0].name}' (clips are {', '.join(VIDEO_SUFFIXES)})")
    caption, _ = read_caption(captions[0])
    return Sample(name, (Clip(None if text_only else clips[0], caption),))
