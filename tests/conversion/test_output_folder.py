"""Where a pipeline is to be written is looked at before any work, and nothing half-written stays."""

import os
import resource
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from longlive_diffusers.conversion.output_folder import prepare_output, save_atomically
from tests.support.tiny_pipeline import tiny_pipeline


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A folder to work in: with a file, an empty folder, a full one, and links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("the only copy")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "to_empty").symlink_to("empty")
    (tmp_path / "to_full").symlink_to("full")
    (tmp_path / "to_nowhere").symlink_to("nowhere")
    (tmp_path / "round").symlink_to("round")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("new", "new"),
        ("new/deeper", "new/deeper"),
        ("empty", "empty"),
        ("empty/../empty", "empty"),
        ("empty/", "empty"),
        ("to_empty", "empty"),
        ("to_nowhere", "nowhere"),
        ("12:30", "12:30"),
        (Path("new"), "new"),
    ],
)
def test_what_can_be_written(here, output, found):
    assert prepare_output(output) == here.resolve() / found


def test_a_home_is_found(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert prepare_output("~/new") == here.resolve() / "new"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "'' is no name"),
        ("a\0b", "is no name"),
        ("file", "file is a file"),
        ("full", "full already holds 1 files"),
        ("to_full", "to_full already holds 1 files"),
        ("empty/../full", "already holds 1 files"),
        (".", "already holds 7 files"),
        ("file/new", "file is not a folder"),
        ("file/new/deeper", "file is not a folder"),
        ("x" * 300, "File name too long"),
        ("x" * 250, "File name too long"),  # the temporary name beside it would be
        ("round", "cannot be written"),
        ("/dev/null/new", "/dev/null is not a folder"),
        ("/proc/new", "cannot be written"),
    ],
)
def test_what_cannot(here, output, message):
    before = sorted(here.rglob("*"))
    with pytest.raises(ValueError, match=message):
        prepare_output(output)
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is writable for root")
def test_a_folder_that_is_write_protected(here):
    (here / "empty").chmod(0o500)
    with pytest.raises(ValueError, match="empty/new cannot be written: Permission denied"):
        prepare_output("empty/new")


def test_a_disk_without_room_is_told_before_writing(here, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20 // 10))
    with pytest.raises(OSError, match=r"new needs 0\.00 GiB, and its disk has 0\.00 GiB left"):
        save_atomically(tiny_pipeline(), prepare_output("new"), ModelCard("card"))
    assert not list(here.glob(".new*")) and not (here / "new").exists()


def test_a_disk_that_fails_meanwhile_is_an_os_error_and_leaves_nothing(here):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"new' could not be written: .*File too large"):
            save_atomically(tiny_pipeline(tokenizer=None, text_encoder=None), prepare_output("new"), ModelCard("card"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(here.glob(".new*")) and not (here / "new").exists()
