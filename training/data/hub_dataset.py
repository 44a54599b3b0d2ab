"""Data sets of videos on the Hub, through the package `datasets`: each becomes a folder with a list of clips.

Videos that `datasets` has as files stay where they are; those that it has as bytes, in Parquet files, are written into
the folder, each once.
"""

import hashlib
import importlib
import json
from pathlib import Path, PurePath
from types import ModuleType

from data.metadata_file import CAPTION_COLUMNS, FILE_COLUMN
from longlive_diffusers.atomic_write import new_file, write_text


def write_list(
    name: str,
    folder: Path,
    *,
    config: str | None = None,
    split: str = "train",
    caption_column: str | None = None,
) -> None:
    """
    Download a data set, and write its list of clips, `metadata.jsonl`.

    Args:
        name: The repository of the data set, or a local folder that `datasets` can load.
        folder: The folder to write to; it is created if there is none.
        config: The configuration of the data set, if it has several.
        split: The part of the data set.
        caption_column: The column of the captions; None for the one of the usual names that is there.

    Raises:
        ValueError: If `datasets` is not installed, the data set cannot be loaded, or it has no column of videos or of
            captions.
    """
    datasets = _datasets()
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"The data set '{name}' cannot be loaded: {error}") from error
    columns = list(dataset.features)
    videos = [column for column in columns if isinstance(dataset.features[column], datasets.Video)]
    captions = [column for column in ((caption_column,) if caption_column else CAPTION_COLUMNS) if column in columns]
    for kind, found in (("videos", videos), ("captions", captions)):
        if len(found) != 1:
            hint = "; name it with --caption_column" if kind == "captions" else ""
            raise ValueError(
                f"The data set '{name}' must have one column of {kind}, but has {len(found)} among its columns "
                f"{', '.join(columns)}{hint}"
            )
    rows = dataset.select_columns([*videos, *captions]).cast_column(videos[0], datasets.Video(decode=False))
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    caption_name = caption_column or captions[0]
    lines = [
        json.dumps({FILE_COLUMN: _file(row[videos[0]], folder), caption_name: row[captions[0]]}) + "\n" for row in rows
    ]
    write_text(folder / "metadata.jsonl", "".join(lines))


def _datasets() -> ModuleType:
    try:
        datasets = importlib.import_module("datasets")
        importlib.import_module("datasets.features.video")  # older versions have no videos
    except ImportError as error:
        raise ValueError(
            "--dataset_name needs the package datasets, version 3.1 or newer: pip install -U datasets"
        ) from error
    return datasets


def _file(video: dict | None, folder: Path) -> str:
    """Return the path of a video file, absolute or relative to the folder; it is written if there are only its bytes.
    A row without a video has an empty path."""
    if video is None:
        return ""
    content, path = video["bytes"], video["path"]
    if content is None:
        return path or ""
    suffix = PurePath(path or "").suffix or ".mp4"
    written = PurePath("videos", f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}")
    if not (folder / written).exists():
        with new_file(folder / written) as temporary:
            temporary.write_bytes(content)
    return written.as_posix()
