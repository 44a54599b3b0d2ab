"""Devices are those that torch can compute on here."""

import pytest
import torch

from longlive_diffusers.cli.device import choose_device


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cpu", "cpu:0", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is_there_is_chosen(name):
    assert choose_device(name) == torch.device(name)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    "name", ["cuda:2", "cuda:99", "cuda:256", "cuda:1000", "cpu:1", "meta", "xpu", "mps", "hpu:0"]
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match=f"there is no device '{name}' here, only cpu and cuda:0 to cuda:1"):
        choose_device(name)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["", "abacus", "cuda:-1", "cuda:x", "GPU", "cuda 1"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(ValueError, match="is not a device; here, it is cpu or cuda"):
        choose_device(name)
