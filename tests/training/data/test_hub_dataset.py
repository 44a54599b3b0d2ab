"""Data sets of the Hub become a folder with a list of clips; here of a stand-in for the package `datasets`."""

import json
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

from data.clips import scan
from data.hub_dataset import write_list


@dataclass
class Video:
    decode: bool = True


@dataclass
class Table:
    """What is used of a `datasets.Dataset`: its columns may be left out, and give bytes and paths of videos."""

    features: dict[str, object]
    rows: list[dict]
    kept: tuple[str, ...] = ()
    decoded: dict[str, bool] = field(default_factory=dict)

    def select_columns(self, columns: list[str]) -> "Table":
        return Table(self.features, self.rows, tuple(columns), self.decoded)

    def cast_column(self, column: str, feature: Video) -> "Table":
        return Table(self.features, self.rows, self.kept, {column: feature.decode})

    def __iter__(self):
        assert self.decoded == {"video": False}, "decoding videos takes packages that are not needed"
        return iter([{column: row[column] for column in self.kept} for row in self.rows])


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """Its `table` is what any name gives; `asked` says what for."""
    state = SimpleNamespace(table=None, asked=[])

    class DatasetsError(Exception):
        pass

    def load_dataset(name, config=None, *, split):
        state.asked.append((name, config, split))
        if isinstance(state.table, Exception):
            raise state.table
        return state.table

    module, features = ModuleType("datasets"), ModuleType("datasets.features")
    module.load_dataset, module.Video = load_dataset, Video
    module.exceptions = SimpleNamespace(DatasetsError=DatasetsError)
    state.DatasetsError = DatasetsError
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(sys.modules, "datasets.features", features)
    monkeypatch.setitem(sys.modules, "datasets.features.video", ModuleType("datasets.features.video"))
    return state


def test_videos_as_files_and_as_bytes(hub, tmp_path):
    (tmp_path / "blob").write_bytes(b"of the first")
    rows = [
        {"video": {"bytes": None, "path": str(tmp_path / "blob")}, "text": "one", "audio": 1},
        {"video": {"bytes": b"of the second", "path": "clip 2.webm"}, "text": "two", "audio": 1},
        {"video": {"bytes": b"of the second", "path": None}, "text": "\ud800", "audio": 1},
        {"video": None, "text": "four", "audio": 1},
        {"video": {"bytes": b"of the fifth", "path": None}, "text": None, "audio": 1},
    ]
    hub.table = Table({"video": Video(), "text": str, "audio": str}, rows)
    write_list("somebody/videos", tmp_path / "set", config="small", split="validation")
    assert hub.asked == [("somebody/videos", "small", "validation")]
    samples, skipped = scan(tmp_path / "set")
    assert [clip.caption for sample in samples for clip in sample.clips] == ["one", "two"]
    assert [sample.clips[0].path.read_bytes() for sample in samples] == [b"of the first", b"of the second"]
    assert samples[1].clips[0].path.suffix == ".webm"
    reasons = list(skipped.values())
    assert "no text" in reasons[0] and "must name its clip" in reasons[1] and "must be a text" in reasons[2]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "videos").iterdir()}
    write_list("somebody/videos", tmp_path / "set")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "videos").iterdir()} == written
    assert hub.asked[1] == ("somebody/videos", None, "train")


def test_columns(hub, tmp_path):
    row = {"video": {"bytes": b"x", "path": None}, "text": "one", "title": "two", "caption": "three"}
    hub.table = Table({"video": Video(), "text": str, "title": str}, [row])
    write_list("a/b", tmp_path, caption_column="title")
    assert json.loads((tmp_path / "metadata.jsonl").read_text())["title"] == "two"
    assert scan(tmp_path, caption_column="title")[0][0].clips[0].caption == "two"
    videos, both = {"video": Video(), "text": str}, {"video": Video(), "text": str, "caption": str}
    for features, message in [
        ({"text": str}, "videos, but has 0 among its columns text$"),
        ({"other": Video(), **videos}, "videos, but has 2 among its columns other, video, text$"),
        ({"video": Video(), "title": str}, "captions, but has 0 .* video, title; name it with --caption_column$"),
        (both, "captions, but has 2 .* video, text, caption; name it with --caption_column$"),
    ]:
        hub.table = Table(features, [row])
        with pytest.raises(ValueError, match=f"The data set 'a/b' must have one column of {message}"):
            write_list("a/b", tmp_path)


def test_data_sets_that_cannot_be_loaded(hub, tmp_path):
    for error in (FileNotFoundError("doesn't exist"), ValueError("Unknown split"), hub.DatasetsError("broken")):
        hub.table = error
        with pytest.raises(ValueError, match=f"The data set 'a/b' cannot be loaded: {error}"):
            write_list("a/b", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("missing", ["datasets", "datasets.features.video"])
def test_the_package_is_optional(hub, monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r"--dataset_name needs the package datasets, version 3.1 or newer: pip "):
        write_list("a/b", tmp_path)
