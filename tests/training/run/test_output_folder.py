"""The folder of a run: it is this run's alone, and can be written to."""

import subprocess
import sys

import pytest
from accelerate import Accelerator

from run.output_folder import output_folder


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_a_second_run_is_kept_out_until_the_first_ends(accelerator, tmp_path):
    folder = tmp_path / "run"
    left = folder / "checkpoint-2.partial"
    with output_folder(accelerator, folder):
        left.mkdir()  # half-written by the first run
        with (
            pytest.raises(ValueError, match="another run is writing to this folder"),
            output_folder(accelerator, folder),
        ):
            pass
        assert left.exists()
    with output_folder(accelerator, folder):
        assert not left.exists()


def test_a_killed_run_keeps_nobody_out(accelerator, tmp_path):
    code = f"import os, filelock; filelock.FileLock({str(tmp_path / '.lock')!r}).acquire(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with output_folder(accelerator, tmp_path):
        pass


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/no-such-process/run"])
def test_a_folder_that_cannot_be_made_is_named(accelerator, tmp_path, path):
    (tmp_path / "file").write_text("text")
    with (
        pytest.raises(ValueError, match=rf"--output_dir '{tmp_path / path}' cannot be written to: "),
        output_folder(accelerator, tmp_path / path),
    ):
        pass


def test_what_a_killed_run_left_is_removed_and_nothing_else(accelerator, tmp_path):
    kept = {"checkpoint-2", "result", "log.jsonl", ".hidden", "download.partial", ".download.partial"}
    left = {"checkpoint-4.partial", ".result.0123abcd.partial", ".log.jsonl.89efcdab.partial"}
    for name in kept | left:
        if "log" in name or "load" in name:
            (tmp_path / name).write_text("text")
        else:
            (tmp_path / name / "transformer").mkdir(parents=True)
    with output_folder(accelerator, tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == kept | {".lock"}
