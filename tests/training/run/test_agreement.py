"""What processes agree on; several processes are tested by runs of the script."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from run.agreement import check_processes, on_main_process


@pytest.mark.parametrize("started", [2, 8])
def test_processes_that_would_be_runs_of_their_own_are_refused(monkeypatch, started):
    monkeypatch.setenv("WORLD_SIZE", str(started))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=rf"{started} processes were started.*set .*ACCELERATE_USE_CPU=true"):
        check_processes(SimpleNamespace(num_processes=1))


@pytest.mark.parametrize(
    "variables", [{}, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}]
)
def test_processes_that_know_of_each_other(monkeypatch, variables):
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_processes(SimpleNamespace(num_processes=int(variables.get("WORLD_SIZE", 1))))


def test_a_variable_that_was_left_in_the_shell_is_no_start(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    check_processes(SimpleNamespace(num_processes=1))


def test_the_result_and_the_error_of_the_main_process():
    accelerator = Accelerator(cpu=True)
    assert on_main_process(accelerator, lambda: "name") == "name"
    with pytest.raises(PermissionError):
        on_main_process(accelerator, lambda: (_ for _ in ()).throw(PermissionError("no")))
