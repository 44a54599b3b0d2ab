"""The log of a run: it goes on after a checkpoint, also if something else ended the last one."""

import pytest
from accelerate.utils import LoggerType

from run.log import TrainingLog, check_tracker, read_log


@pytest.mark.parametrize("end", [b"", b'{"step": 3, "lo', b"\0" * 100, b"\xff\xfe\n", b"3\n[]\n{}\nnull\n"])
def test_it_goes_on_after_its_last_whole_line(tmp_path, end):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n' + end)
    assert [entry["step"] for entry in read_log(path)] == [1, 2]
    TrainingLog(path, 1).write({"step": 2, "loss": 0.125})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.125}\n'


def test_there_are_no_entries_before_the_first(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []


@pytest.mark.parametrize("name", [None, "all", "tensorboard"])
def test_a_tracker_that_is_installed(monkeypatch, name):
    monkeypatch.setattr("run.log.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    check_tracker(name)


@pytest.mark.parametrize("name", ["wandb", "telegraph", "tensorboard,wandb"])
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, name):
    monkeypatch.setattr("run.log.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(
        ValueError, match=rf"--report_to {name} is no tracker .* installed; those that are: tensorboard"
    ):
        check_tracker(name)
