"""Files and folders appear complete or not at all; what fails leaves what was there, and nothing beside it."""

from pathlib import Path

import pytest

from longlive_diffusers.atomic_write import new_file, new_folder, write_text


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_appears_when_it_is_complete(tmp_path):
    with new_file(tmp_path / "file.txt") as unfinished:
        unfinished.write_text("half")
        assert "file.txt" not in contents(tmp_path)
        unfinished.write_text("whole")
    assert contents(tmp_path) == {"file.txt": "whole"}
    write_text(tmp_path / "file.txt", "gr\u00fcn")
    assert (tmp_path / "file.txt").read_bytes() == "gr\u00fcn".encode()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_fails_leaves_the_one_that_was_there(tmp_path, error):
    write_text(tmp_path / "file.txt", "before")
    with pytest.raises(error), new_file(tmp_path / "file.txt") as unfinished:
        unfinished.write_text("half")
        raise error
    assert contents(tmp_path) == {"file.txt": "before"}


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with new_file(tmp_path / "file.txt") as first, new_file(tmp_path / "file.txt") as second:
        first.write_text("first")
        second.write_text("second")
    assert contents(tmp_path) == {"file.txt": "first"}, "the outer one is the last to finish"


@pytest.mark.parametrize("there_before", [False, True])
def test_a_folder_appears_when_it_is_complete(tmp_path, there_before):
    folder = tmp_path / "new" / "folder"
    if there_before:
        folder.mkdir(parents=True)
    with new_folder(folder) as unfinished:
        (unfinished / "a.txt").write_text("a")
        assert not (folder / "a.txt").exists()
    assert contents(tmp_path) == {"new/folder/a.txt": "a"}
    assert len(list(folder.parent.iterdir())) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_fails_leaves_nothing(tmp_path, error, replace):
    with pytest.raises(error), new_folder(tmp_path / "folder", replace=replace) as unfinished:
        (unfinished / "a.txt").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_replaced_only_if_that_is_asked_for(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_text(folder / "old.txt", "old")
    with pytest.raises(OSError), new_folder(folder) as unfinished:
        (unfinished / "new.txt").write_text("new")
    assert contents(tmp_path) == {"folder/old.txt": "old"}
    with pytest.raises(ValueError), new_folder(folder, replace=True):
        raise ValueError
    assert contents(tmp_path) == {"folder/old.txt": "old"}
    with new_folder(folder, replace=True) as unfinished:
        (unfinished / "new.txt").write_text("new")
    assert contents(tmp_path) == {"folder/new.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_in_the_folders_place_is_kept(tmp_path):
    write_text(tmp_path / "folder", "a file")
    with pytest.raises(OSError), new_folder(tmp_path / "folder") as unfinished:
        (unfinished / "new.txt").write_text("new")
    assert contents(tmp_path) == {"folder": "a file"}


@pytest.mark.parametrize("name", [".", "..", "inner/.."])
def test_the_current_folder_can_be_named_by_dots(tmp_path, monkeypatch, name):
    here = tmp_path / "outer" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    if name != ".":
        (here / "inner").mkdir()
    target = Path(name).resolve()
    with new_folder(name, replace=name != ".") as unfinished:
        (unfinished / "a.txt").write_text("a")
    assert contents(target) == {"a.txt": "a"}
