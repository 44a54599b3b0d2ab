"""`longlive serve --ray`: what is refused before Ray is imported, and what is set aside for each replica."""

import os

import pytest
import torch

from longlive_diffusers.cli import main
from longlive_diffusers.cli.command_line import parse_arguments
from longlive_diffusers.cli.replicas import check_replica_options, replicas_here, replicas_on
from longlive_diffusers.serve.replicas import Replicas


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--replicas 2", "--replicas is for --ray"),
        ("--max-replicas 2", "--max-replicas is for --ray"),
        ("--ray --replicas 2 --max-replicas 3", "give either --replicas or --max-replicas, not both"),
        ("--ray --devices 2", "--devices 2 and --ray exclude each other"),
    ],
)
def test_options_that_contradict_each_other(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_replica_options(parse_arguments(["serve", *arguments.split()]))


@pytest.mark.parametrize("arguments", ["", "--ray", "--ray --replicas 3", "--ray --max-replicas 1"])
def test_options_that_go_together(arguments: str) -> None:
    check_replica_options(parse_arguments(["serve", *arguments.split()]))


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
@pytest.mark.parametrize("option", ["--replicas", "--max-replicas"])
def test_there_is_one_replica_at_least(option: str, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["serve", "--ray", option, count])
    assert "must be an integer from 1 to 1024" in capsys.readouterr().err


def test_torchrun_and_ray_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2" if "SIZE" in name else "0")
    with pytest.raises(ValueError, match="run longlive serve without torchrun"):
        check_replica_options(parse_arguments(["serve", "--ray"]))


@pytest.mark.parametrize(
    "arguments, device, replicas, said",
    [
        ("", CPU, Replicas(1, 1, 0), "1 replica"),
        ("--replicas 3", GPU, Replicas(3, 3, 1), "3 replicas"),
        ("--max-replicas 8", GPU, Replicas(1, 8, 1), "1 to 8 replicas"),
        ("--max-replicas 1", CPU, Replicas(1, 1, 0), "1 replica"),
    ],
)
def test_each_replica_has_a_gpu_if_there_are_any(
    arguments: str, device: torch.device, replicas: Replicas, said: str
) -> None:
    asked = replicas_on(device, parse_arguments(["serve", "--ray", *arguments.split()]))
    assert asked == replicas and str(asked) == said


@pytest.mark.parametrize("device", ["cuda:1", "cpu:0", "mps", "xpu"])
def test_devices_that_ray_cannot_give_to_replicas(device: str) -> None:
    with pytest.raises(ValueError, match=r"--device \w+:\d is one device|not on (mps|xpu)"):
        replicas_on(torch.device(device), parse_arguments(["serve", "--ray"]))


def test_there_are_no_more_replicas_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longlive_diffusers.cli.replicas.available_devices", lambda: {"cpu": 1, "cuda": 2})
    for option in ("--replicas", "--max-replicas"):
        assert replicas_here(GPU, parse_arguments(["serve", "--ray", option, "2"])).most == 2
        with pytest.raises(ValueError, match="3 replicas need a GPU each, but there are only 2 here"):
            replicas_here(GPU, parse_arguments(["serve", "--ray", option, "3"]))


def test_replicas_on_a_cpu_divide_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cores = [replicas_here(CPU, parse_arguments(["serve", "--ray", "--replicas", n])).num_cpus for n in "1238"]
    assert cores == [8, 4, 2, 1]
    assert replicas_here(CPU, parse_arguments(["serve", "--ray", "--replicas", "20"])).num_cpus == 1


@pytest.mark.parametrize("missing", ["ray", "fastapi"])
def test_a_missing_extra_is_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    assert main(["serve", "--ray"]) == 2
    expected = f"longlive: error: longlive serve needs the package {missing}: pip install 'longlive-diffusers[ray]'\n"
    assert capsys.readouterr().err == expected
