"""Files and folders appear complete or not at all; what fails leaves what was there, and nothing beside it."""

import os
import tempfile
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from longlive_diffusers.atomic_write import check_new_file, new_file, new_folder, write_text


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


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_what_safetensors_says_of_the_disk_is_an_error_of_the_disk(tmp_path, new):
    message = r"^'.*model' could not be written: I/O error: File too large"
    with pytest.raises(OSError, match=message), new(tmp_path / "model"):
        raise SafetensorError("I/O error: File too large")
    assert not list(tmp_path.iterdir())


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


NAMES = (
    "12:30.txt",
    "C:a.txt",
    "http:a",
    "a\nb",
    "-a",
    "~nobody.txt",
    "..txt",
    "dot.",
    " ",
    "\udcff",
    "x" * 255,
    "é" * 127,
)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_a_file_may_have_can_be_written(tmp_path, name):
    assert check_new_file(tmp_path / name) == tmp_path / name
    for text in ("new", "replaced"):
        write_text(tmp_path / name, text)
        assert contents(tmp_path) == {name: text}


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there" / "old").write_text("old")
    for name in ("old", "new"):
        write_text(check_new_file(tmp_path / name), "text")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "there" / name).read_text() == "text"


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    (tmp_path / "nothing").symlink_to(os.devnull)
    write_text(check_new_file(tmp_path / "nothing"), "text")
    assert (tmp_path / "nothing").is_char_device()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_with_the_file(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/full'"):
        write_text(tmp_path / "full", "text")


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError) as error:
        write_text(tmp_path / "a", "text")
    assert error.value.filename == str(tmp_path / "a") and error.value.filename2 is None


@pytest.mark.parametrize("how", ["by name", "by descriptor"])
def test_a_pipe_is_written_to(tmp_path, how):
    """By descriptor, as a shell's `>(command)` names it."""
    reader, writer = os.pipe()
    if how == "by name":
        os.mkfifo(tmp_path / "pipe")
    path = check_new_file(tmp_path / "pipe" if how == "by name" else f"/dev/fd/{writer}")
    received = []

    def receive():
        with open(path if how == "by name" else reader, "rb") as source:
            received.append(source.read(4))

    thread = threading.Thread(target=receive)
    thread.start()
    write_text(path, "text")
    thread.join(timeout=10)
    os.close(writer)
    assert received == [b"text"]


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "astray").symlink_to(tmp_path / "missing" / "file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for name, message in [
        ("folder", "it is a folder"),
        ("missing/file", "missing' does not exist"),
        ("missing/../file", "missing/..' does not exist"),
        ("astray", "missing', to which .*astray' leads, does not exist"),
        ("loop", "leads back to itself"),
        ("file/below", "file' does not exist"),
        ("x" * 256, "File name too long"),
        ("é" * 128, "File name too long"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_new_file(tmp_path / name)

    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"Cannot write '.*new': Read-only file system"):
        check_new_file(tmp_path / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "file")
    with pytest.raises(ValueError, match="permission denied"):
        check_new_file(tmp_path / "file")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_is_written_through_a_link(tmp_path, is_there):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    if is_there:
        target.mkdir()
        (target / "old").touch()
    with new_folder(link, replace=True) as folder:
        (folder / "new").touch()
    assert link.is_symlink() and [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
