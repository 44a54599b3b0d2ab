"""Copies from the host: which of them the host may leave before they are done."""

import pytest
import torch

from longlive_diffusers.host_copies import to_device


class Copied(torch.Tensor):
    """A tensor on the host that notes how it is copied."""

    how: dict


def copied(device: str) -> Copied:
    tensor = torch.zeros(3).as_subclass(Copied)
    tensor.how = {"pinned": False}

    def pin_memory() -> Copied:
        tensor.how["pinned"] = True
        return tensor

    tensor.pin_memory = pin_memory
    tensor.to = lambda device, non_blocking=False: tensor.how.update(device=device, non_blocking=non_blocking)
    to_device(tensor, torch.device(device))
    return tensor


@pytest.mark.parametrize("device", ["mps", "xpu", "cpu"])
def test_a_copy_from_memory_that_may_be_freed_is_waited_for(device):
    """Metal reads it later."""
    assert copied(device).how == {"pinned": False, "device": torch.device(device), "non_blocking": False}


def test_a_copy_to_cuda_is_from_pinned_memory_and_not_waited_for():
    assert copied("cuda").how == {"pinned": True, "device": torch.device("cuda"), "non_blocking": True}
