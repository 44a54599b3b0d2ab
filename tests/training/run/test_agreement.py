"""What processes agree on; several processes are tested by runs of the script."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from run.agreement import check_processes, on_main_process


@pytest.mark.parametrize(
    ("started", "known", "refused"), [(None, 1, False), (1, 1, False), (2, 2, False), (2, 1, True), (8, 1, True)]
)
def test_processes_that_would_be_runs_of_their_own_are_refused(monkeypatch, started, known, refused):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started is not None:
        monkeypatch.setenv("WORLD_SIZE", str(started))
    if not refused:
        return check_processes(SimpleNamespace(num_processes=known))
    with pytest.raises(ValueError, match=f"{started} processes were started.*set .*ACCELERATE_USE_CPU=true"):
        check_processes(SimpleNamespace(num_processes=known))


def test_the_result_and_the_error_of_the_main_process():
    accelerator = Accelerator(cpu=True)
    assert on_main_process(accelerator, lambda: "name") == "name"
    with pytest.raises(PermissionError):
        on_main_process(accelerator, lambda: (_ for _ in ()).throw(PermissionError("no")))
