"""Offloading moves weights without telling their layers, which choose their backends anew where they compute.

The GPU is pretended: tensors in torch's fake mode have shapes and devices, but no numbers.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from longlive_diffusers.nvfp4 import NVFP4Linear
from tests.nvfp4.test_linear import inputs, plain_linear


GPU = torch.device("cuda", 0)


@pytest.fixture
def pretended_gpu(monkeypatch) -> Iterator[Callable[[tuple[int, int]], None]]:
    """Fake tensors everywhere; the fixture's value sets the compute capability of the GPU."""
    transfer = ModuleGroup._transfer_tensor_to_device

    def transfer_fake(group: ModuleGroup, tensor: torch.Tensor, *arguments) -> None:
        transfer(group, tensor, *arguments)
        tensor.fake_device = group.onload_device  # which assigning to `.data` changes in real tensors

    def set_capability(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.setattr(ModuleGroup, "_transfer_tensor_to_device", transfer_fake)
    with FakeTensorMode(), torch.no_grad():
        yield set_capability


def offload_groups(model: nn.Module) -> None:
    apply_group_offloading(model, onload_device=GPU, offload_type="leaf_level")


def offload_sequentially(model: nn.Module) -> None:
    cpu_offload(model, GPU, offload_buffers=True)


@pytest.mark.parametrize("offload", [offload_groups, offload_sequentially])
@pytest.mark.parametrize(
    ("capability", "requested", "expected"),
    [
        ((8, 0), "auto", "w4a16"),
        ((9, 0), "auto", "w4a16"),
        ((9, 0), "fp8", "fp8"),
        ((10, 0), "auto", "scaled_mm"),
        ((10, 0), "emulate", "emulate"),
    ],
)
def test_offloaded_layers_compute_as_their_gpu_does(
    monkeypatch, pretended_gpu, offload, capability, requested, expected
):
    pretended_gpu(capability)
    layers = [NVFP4Linear(64, size, bias=False, backend=requested) for size in (64, 32)]
    model = nn.Sequential(*layers)
    assert {layer.backend.name for layer in layers} == {"emulate" if requested == "auto" else requested}
    multiply, chosen = NVFP4Linear.multiply, []

    def multiply_and_note(layer: NVFP4Linear, rows: torch.Tensor) -> torch.Tensor:
        product = multiply(layer, rows)
        chosen.append(layer.backend.name)
        return product

    monkeypatch.setattr(NVFP4Linear, "multiply", multiply_and_note)
    offload(model)
    for _ in range(2):
        assert model(torch.zeros(24, 64, device=GPU)).device == GPU
        assert {layer.weight_codes.device.type for layer in layers} <= {"cpu", "meta"}  # offloaded again
    assert chosen == [expected] * 4


def test_a_product_of_another_device_is_not_used():
    layer = NVFP4Linear.from_linear(plain_linear())
    expected = layer(inputs())
    layer.product_on = (GPU, nn.Identity())
    assert torch.equal(layer(inputs()), expected)
    assert layer.product_on[0] == torch.device("cpu")


@pytest.mark.parametrize("backend", ["emulate", "w4a16", "fp8"])
def test_nothing_of_a_layer_is_moved_but_what_is_stored(backend):
    """What a product keeps belongs to one device. Were it a buffer, diffusers would look for a copy of it in the CPU's
    memory, though it may have been made after the copies."""
    layer = NVFP4Linear.from_linear(plain_linear(), backend=backend)
    assert sorted(name for name, _ in layer.named_buffers()) == ["weight_amax", "weight_codes", "weight_scales"]
    assert list(layer.children()) == []


def test_group_offloading_changes_nothing():
    layer = NVFP4Linear.from_linear(plain_linear())
    expected = layer(inputs())
    apply_group_offloading(layer, onload_device=torch.device("cpu"), offload_type="leaf_level")
    for _ in range(2):
        assert torch.equal(layer(inputs()), expected)
