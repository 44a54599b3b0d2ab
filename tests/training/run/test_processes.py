"""What accelerate is configured for and the scripts cannot do is refused when a run starts."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import train_ar
import train_dmd
from run import processes
from run.arguments import RunArguments
from run.processes import build_accelerator, check_configuration


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("kind", "is_fsdp2", "message"),
    [
        (DistributedType.FSDP, False, "FSDP 1, its default: set fsdp_version: 2"),
        (DistributedType.DEEPSPEED, False, "configured for DEEPSPEED"),
        (DistributedType.MEGATRON_LM, False, "configured for MEGATRON_LM"),
        (DistributedType.FSDP, True, None),
        (DistributedType.MULTI_GPU, False, None),
        (DistributedType.NO, False, None),
    ],
)
def test_kinds_of_parallelism(kind, is_fsdp2, message):
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=is_fsdp2, gradient_accumulation_steps=1)
    if message is None:
        check_configuration(accelerator, 1)
        return
    with pytest.raises(ValueError, match=message):
        check_configuration(accelerator, 1)


@pytest.mark.parametrize("asked", [1, 2])
def test_accumulation_that_the_environment_sets_is_refused_unless_it_is_the_same(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"accumulate 4 batches \(--gradient_accumulation_steps of accelerate launch"):
        build_accelerator(RunArguments(output_dir=str(tmp_path)), asked)
    assert build_accelerator(RunArguments(output_dir=str(tmp_path)), 4).gradient_accumulation_steps == 4


def test_both_scripts_say_so_and_write_nothing(workshop, studio, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    for script, options in ((train_ar, workshop.options), (train_dmd, studio.options)):
        assert script.run(options(tmp_path / "run", gradient_accumulation_steps=2)) == 2
        assert "accelerate is configured to accumulate 4 batches" in capsys.readouterr().err
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "run").exists()


def test_processes_wait_for_each_other_for_longer_than_ten_minutes(tmp_path, monkeypatch):
    given = {}
    real = processes.Accelerator
    monkeypatch.setattr(processes, "Accelerator", lambda **options: given.update(options) or real(**options))
    build_accelerator(RunArguments(output_dir=str(tmp_path)))
    (waiting,) = given["kwargs_handlers"]
    assert waiting.timeout > timedelta(hours=6)
    assert waiting.to_kwargs().keys() == {"timeout"}  # the backend is accelerate's choice
