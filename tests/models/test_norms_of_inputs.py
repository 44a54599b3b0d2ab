"""Norms that give rows in FP8: where they do, that nothing else is lost, and that the result is that of the parts."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from torch import nn

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.fp8.rows import FP8Rows
from longlive_diffusers.fused import residual
from longlive_diffusers.fused.feed_forward import FusedGELU
from longlive_diffusers.fused.layers import is_for_inference
from longlive_diffusers.models import fp8_feed_forward, norms_of_inputs
from longlive_diffusers.models.transformer_longlive import LongLiveTransformerBlock
from longlive_diffusers.nvfp4 import NVFP4Linear
from longlive_diffusers.nvfp4.fp8_linear import FP8Linear
from tests.support.nvfp4_models import small_transformer
from tests.support.tiny_pipeline import stream_chunks


QUANTIZING = {
    "attn1": "norm_in_fp8",
    "attn2": "add_and_norm_in_fp8",
    "ffn": "add_and_norm_in_fp8",
    "last": "gelu_in_fp8",
}
"""What quantizes for the layers of a block that read an input, and for the last one of its feed-forward."""

EVERYWHERE = list(QUANTIZING.values())
NUM_CHUNKS = 2


def exchange_layers(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child))


def in_fp8() -> LongLiveTransformer3DModel:
    model = small_transformer(num_layers=1).bfloat16()
    exchange_layers(model.blocks, FP8Linear)
    return model


@pytest.fixture
def model() -> LongLiveTransformer3DModel:
    return in_fp8()


@torch.no_grad()
def forwards(model: LongLiveTransformer3DModel) -> tuple[torch.Tensor, list[str]]:
    """What a stream's forwards give where kernels are said to be for this device, and the functions that quantize in
    each. These compute the same in plain PyTorch, bit for bit."""
    names: list[str] = []

    def noted(module, name: str):
        function = getattr(module, name)

        def call(*args, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        return mock.patch.object(module, name, call)

    with (
        mock.patch.object(norms_of_inputs, "uses_fused_kernels", lambda x: is_for_inference()),
        noted(residual, "norm_in_fp8"),
        noted(residual, "add_and_norm_in_fp8"),
        noted(fp8_feed_forward, "gelu_in_fp8"),
    ):
        result = stream_chunks(model, NUM_CHUNKS)
    of_a_forward = names[: len(names) // NUM_CHUNKS]
    assert names == NUM_CHUNKS * of_a_forward
    return result, of_a_forward


@torch.no_grad()
def plain(model: LongLiveTransformer3DModel) -> torch.Tensor:
    return stream_chunks(model, NUM_CHUNKS)


def test_all_norms_and_gelu_give_rows_in_fp8(model):
    expected = plain(model)
    found, names = forwards(model)
    assert torch.equal(found, expected) and names == EVERYWHERE


def test_so_they_do_for_layers_in_nvfp4_that_multiply_in_fp8():
    model = small_transformer(num_layers=1)
    exchange_layers(model.blocks, lambda layer: NVFP4Linear.from_linear(layer, backend="fp8"))
    model.bfloat16()
    expected = plain(model)
    found, names = forwards(model)
    assert torch.equal(found, expected) and names == EVERYWHERE


def test_so_they_do_with_an_activation_that_was_fused_before(model):
    ffn = model.blocks[0].ffn
    ffn.net[0] = FusedGELU.sharing(ffn.net[0])
    expected = plain(model)
    found, names = forwards(model)
    assert torch.equal(found, expected) and names == EVERYWHERE


def doubled(module, args, output):
    return 2 * output


def replaced(layer: nn.Module) -> None:
    before = layer.forward
    layer.forward = lambda *args, **kwargs: 2 * before(*args, **kwargs)


CHANGES: dict[str, tuple[Callable[[LongLiveTransformerBlock], object], set[str]]] = {
    "hook on a value layer": (lambda block: block.attn1.to_v.register_forward_hook(doubled), {"attn1"}),
    "hook on attention": (lambda block: block.attn1.register_forward_hook(doubled), {"attn1"}),
    "attention's forward": (lambda block: replaced(block.attn2), {"attn2"}),
    "plain query layer": (lambda block: setattr(block.attn2, "to_q", nn.Linear(32, 32).bfloat16()), {"attn2"}),
    "feed-forward's hook": (lambda block: block.ffn.register_forward_hook(doubled), {"ffn", "last"}),
    "hook on GELU": (lambda block: block.ffn.net[0].register_forward_hook(doubled), {"ffn", "last"}),
    "hook on dropout": (lambda block: block.ffn.net[1].register_forward_hook(doubled), {"ffn", "last"}),
    "first layer's forward": (lambda block: replaced(block.ffn.net[0].proj), {"ffn", "last"}),
    "hook on the last layer": (lambda block: block.ffn.net[2].register_forward_hook(doubled), {"last"}),
    "GELU without tanh": (lambda block: setattr(block.ffn.net[0], "approximate", "none"), {"last"}),
}


@pytest.mark.parametrize(("change", "apart"), CHANGES.values(), ids=CHANGES)
def test_what_is_around_layers_counts(model, change, apart):
    unchanged, (block,) = plain(model), model.blocks
    torch.manual_seed(1)
    change(block)
    expected = plain(model)
    found, names = forwards(model)
    assert torch.equal(found, expected) and not torch.equal(found, unchanged)
    assert names == [name for reader, name in QUANTIZING.items() if reader not in apart]


def test_a_lora_counts_as_something_around_its_layer():
    model = small_transformer(num_layers=1)
    exchange_layers(model.blocks, lambda layer: NVFP4Linear.from_linear(layer, backend="fp8"))
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_v", "net.2"], init_lora_weights=False))
    model.bfloat16()
    expected = plain(model)
    found, names = forwards(model)
    assert torch.equal(found, expected) and names == [QUANTIZING["attn2"], QUANTIZING["ffn"]]


def reads(model: LongLiveTransformer3DModel, dtype: torch.dtype = torch.bfloat16) -> list[bool]:
    (block,), x = model.blocks, torch.randn(1, 4, 32, dtype=dtype)
    with mock.patch.object(norms_of_inputs, "uses_fused_kernels", lambda x: is_for_inference()):
        return [norms_of_inputs.reads_fp8(reader, x) for reader in (block.attn1, block.attn2, block.ffn)]


@torch.no_grad()
def test_other_dtypes_processors_and_compiled_modules_are_left_alone(model):
    (block,) = model.blocks
    assert reads(model) == [True, True, True]
    assert reads(model, torch.float32) == [False, False, False]
    block.attn1.processor = WanAttnProcessor()
    block.attn2.fused_projections = True  # of keys and values: its query is apart
    block.ffn.compile(backend="eager")
    assert reads(model) == [False, True, False]
    model = in_fp8()
    model.blocks[0].attn1.fused_projections = True
    assert reads(model) == [False, True, True]


def test_with_gradients_and_on_a_cpu_nothing_is_in_fp8(model):
    assert reads(model) == [False, False, False]
    with torch.no_grad():
        block, x = model.blocks[0], torch.randn(1, 4, 32).bfloat16()
        assert not any(norms_of_inputs.reads_fp8(reader, x) for reader in (block.attn1, block.attn2, block.ffn))


@torch.no_grad()
def test_dropout_that_drops_is_called(model):
    ffn, x = model.blocks[0].ffn.train(), torch.randn(1, 4, 32).bfloat16()
    ffn.net[1].p = 0.5
    torch.manual_seed(0)
    expected = ffn(x)
    torch.manual_seed(0)
    assert torch.equal(fp8_feed_forward.feed_forward_in_fp8(ffn, FP8Rows.of(x)), expected)
    assert not torch.equal(expected, ffn.eval()(x))
