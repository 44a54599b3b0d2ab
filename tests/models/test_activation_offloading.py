"""Gradient checkpointing with its checkpoints on the host: the same numbers, and nothing that stays on the device."""

import weakref

import pytest
import torch
from peft import LoraConfig

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.host_copies import HostCopy
from longlive_diffusers.models.activation_offloading import checkpoint_on_host
from tests.support.checks import needs_gpu
from tests.support.tiny_pipeline import FORWARDS, every_forward, stream_chunks, tiny_transformer


@pytest.fixture
def model() -> LongLiveTransformer3DModel:
    return tiny_transformer().train()


def gradients_of(model, forward) -> dict[str, torch.Tensor]:
    model.zero_grad()
    forward(model).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("autocasts", [False, True])
@every_forward
def test_gradients_are_those_of_other_checkpoints_to_the_bit(model, forward, autocasts):
    found = []
    for function in (None, checkpoint_on_host):
        model.enable_gradient_checkpointing(function)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocasts):
            found.append(gradients_of(model, forward))
    assert_equal(*found)


def test_a_lora_with_dropout_is_trained_alike(model):
    """The first block's input has no gradient, and dropout is the same when a block runs again."""
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q", "to_v"], init_lora_weights=False))
    found = []
    for function in (None, checkpoint_on_host):
        torch.manual_seed(0)
        model.enable_gradient_checkpointing(function)
        found.append(gradients_of(model, FORWARDS["teacher forcing"]))
    assert_equal(*found)


def inputs_that_stay(model, forward) -> int:
    """How many inputs of blocks are there between forward and backward."""
    inputs = []
    hooks = [
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0])))
        for block in model.blocks
    ]
    output = forward(model)
    stay = sum(reference() is not None for reference in inputs)
    output.square().mean().backward()
    for hook in hooks:
        hook.remove()
    return stay


@pytest.mark.parametrize("forward", [FORWARDS["teacher forcing"], stream_chunks])
def test_no_input_of_a_block_stays(model, forward):
    model.enable_gradient_checkpointing()
    assert inputs_that_stay(model, forward) >= len(model.blocks)
    model.enable_gradient_checkpointing(checkpoint_on_host)
    assert inputs_that_stay(model, forward) == 0


def test_a_copy_keeps_the_numbers_whatever_becomes_of_the_tensor():
    tensor = torch.randn(2, 3, dtype=torch.bfloat16).T.requires_grad_()
    expected, copy = tensor.detach().clone(), HostCopy(tensor)
    with torch.no_grad():
        tensor.zero_()
    for _ in range(2):  # a backward may run twice, and blocks may write to what they are given
        fetched = copy.fetch()
        assert torch.equal(fetched, expected) and fetched.requires_grad and fetched.is_leaf
        fetched.detach().zero_()


@needs_gpu
def test_on_a_gpu_the_gradients_are_the_same_and_less_memory_is_taken():
    model = tiny_transformer(num_layers=8).train().to("cuda")
    forward, found, held = FORWARDS["teacher forcing"], [], []
    for function in (None, checkpoint_on_host):
        model.enable_gradient_checkpointing(function)
        found.append(gradients_of(model, forward))
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        output = forward(model)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del output
    for name, gradient in found[0].items():  # attention's sums are made in any order there
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)
    assert held[1] < held[0]
