"""What diffusers loads with a warning, or cannot load at all, is refused by name."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel, NVFP4Config
from longlive_diffusers.nvfp4 import quantize_model
from tests.support.nvfp4_models import small_transformer
from tests.support.tiny_pipeline import random_inputs, tiny_pipeline, tiny_transformer, tiny_wan_transformer


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_transformer().save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- weights that are missing or left over ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 1}, r"has \d+ weights that the model does not know \(blocks\.1\..*num_layers=1"),
        ({"num_layers": 3}, r"lacks \d+ of its weights \(blocks\.2\..*num_layers=3"),
        ({"cross_attn_norm": False}, r"has 4 weights that the model does not know \(blocks\.0\.norm2"),
    ],
)
def test_a_network_of_other_layers_is_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        LongLiveTransformer3DModel.from_pretrained(folder)


def test_a_weight_that_is_missing_or_strange_is_named(folder):
    weights = load_file(folder / WEIGHTS)
    proj_out = weights.pop("proj_out.weight")
    save_file({**weights, "extra.weight": proj_out}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 of its weights \(proj_out\.weight\) and has 1 weights .*extra\.weight"
    ):
        LongLiveTransformer3DModel.from_pretrained(folder)


def test_the_loading_info_is_still_given(folder):
    model, info = LongLiveTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, LongLiveTransformer3DModel)
    assert not info["missing_keys"] and not info["unexpected_keys"]


# -- single files ----------------------------------------------------------------------------------------------------


def test_a_single_file_is_loaded_by_diffusers_name_too(folder):
    options = {"num_attention_heads": 2, "chunk_size": 2, "dtype": torch.bfloat16}
    model = LongLiveTransformer3DModel.from_single_file(folder / WEIGHTS, **options)
    assert model.proj_out.weight.dtype == torch.bfloat16 and model.config.chunk_size == 2
    assert torch.equal(model.proj_out.weight, tiny_transformer().proj_out.weight.bfloat16())


def test_what_a_single_file_is_not_opened_by_says_what_is(folder):
    with pytest.raises(ValueError, match=r"is a single file: open it with LongLiveTransformer3DModel\.from_original"):
        LongLiveTransformer3DModel.from_pretrained(folder / WEIGHTS)
    with pytest.raises(ValueError, match="longlive convert FILE"):
        LongLivePipeline.from_single_file(folder / WEIGHTS)


@pytest.mark.parametrize(
    ("content", "message"), [(b"GGUF" + bytes(60), "is a GGUF file"), (None, "There is no checkpoint file")]
)
def test_single_files_of_other_kinds(tmp_path, content, message):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        LongLiveTransformer3DModel.from_single_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weight: weight.index_fill(0, torch.tensor([0]), torch.nan),
            "proj_out.weight has 24 infinities or NaN",
        ),
        (lambda weight: weight.index_fill(0, torch.tensor([1]), -torch.inf), "proj_out.weight has 24 infinities"),
        (lambda weight: weight.index_fill(0, torch.tensor([1]), 1e6), r"24 infinities .* \(torch.float16\)"),
    ],
)
def test_weights_that_are_no_numbers(folder, change, message):
    weights = load_file(folder / WEIGHTS)
    weights["proj_out.weight"] = change(weights["proj_out.weight"])
    with pytest.raises(ValueError, match=message):
        LongLiveTransformer3DModel.from_original(weights, num_attention_heads=2, torch_dtype=torch.float16)


# -- networks that diffusers built -----------------------------------------------------------------------------------


def with_lora() -> WanTransformer3DModel:
    wan = tiny_wan_transformer()
    wan.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    return wan


def marked_as_quantized(method: str) -> WanTransformer3DModel:
    wan = tiny_wan_transformer()
    wan.register_to_config(quantization_config={"quant_method": method})
    return wan


def packed_in_bytes() -> WanTransformer3DModel:
    """As GGUF and bitsandbytes keep weights: bytes under the layer's own name."""
    wan = tiny_wan_transformer()
    wan.blocks[0].attn1.to_q.weight = torch.nn.Parameter(torch.zeros(24, 18, dtype=torch.uint8), requires_grad=False)
    return wan


def under_other_names() -> WanTransformer3DModel:
    """As Quanto keeps them: as parts of a tensor."""
    wan = tiny_wan_transformer()
    layer = wan.blocks[0].attn1.to_q
    del layer.weight
    layer.register_buffer("_data", torch.zeros(24, 24, dtype=torch.int8))
    return wan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_lora, "carries a LoRA"),
        (lambda: marked_as_quantized("gguf"), r"is quantized \(.*gguf"),
        (lambda: marked_as_quantized("quanto"), r"is quantized \(.*quanto"),
        (packed_in_bytes, "is quantized"),
        (under_other_names, "is quantized"),
    ],
)
def test_wan_networks_that_are_not_plain(make, message):
    for build in (LongLiveTransformer3DModel.from_wan, lambda wan: tiny_pipeline(transformer=wan)):
        with pytest.raises(ValueError, match=message):
            build(make())


def test_a_wan_network_whose_lora_was_added_for_good_is_taken():
    wan = with_lora()
    torch.nn.init.normal_(wan.blocks[0].attn1.to_q.lora_B["default"].weight)
    wan.fuse_lora()
    wan.unload_lora()
    model = LongLiveTransformer3DModel.from_wan(wan)
    assert torch.equal(model.blocks[0].attn1.to_q.weight, wan.blocks[0].attn1.to_q.weight)
    assert not torch.equal(model.blocks[0].attn1.to_q.weight, tiny_wan_transformer().blocks[0].attn1.to_q.weight)


# -- networks in 4 bits ----------------------------------------------------------------------------------------------


def test_a_quantized_network_goes_through_torch_save(tmp_path):
    model = quantize_model(small_transformer(), NVFP4Config()).eval()
    with torch.no_grad():
        expected = model(**random_inputs()).sample
        torch.save(model, tmp_path / "whole.pt")
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        other = copy.deepcopy(model)
        other.blocks[0].attn1.to_q.weight_codes.zero_()
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        for loaded in (torch.load(tmp_path / "whole.pt", weights_only=False), other):
            assert torch.equal(loaded(**random_inputs()).sample, expected)
    with pytest.raises(ValueError, match="that this package quantized to NVFP4"):
        LongLiveTransformer3DModel.from_original(tmp_path / "weights.pt")


def test_a_quantized_network_loads_while_new_tensors_are_in_double_precision(tmp_path):
    model = quantize_model(small_transformer(), NVFP4Config())
    model.save_pretrained(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        loaded = LongLiveTransformer3DModel.from_pretrained(tmp_path, dtype=torch.float32)
        again = quantize_model(small_transformer().float(), NVFP4Config())
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (loaded, again):
        assert found.blocks[0].attn1.to_q.weight_amax.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(**random_inputs()).sample, model(**random_inputs()).sample)
