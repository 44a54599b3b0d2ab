"""Networks whose layers were changed: what is saved can be loaded again, and a LoRA is left out of nothing."""

import pytest
import torch
from peft import LoraConfig

from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.nvfp4 import NVFP4Config, quantize_model
from tests.support.tiny_pipeline import tiny_pipeline, tiny_transformer
from tests.support.toy_loras import save_toy_lora


LORA = LoraConfig(r=2, target_modules=["to_q", "net.2"], init_lora_weights=False)
FULL_SIZE = {"num_attention_heads": 4, "attention_head_dim": 32}


def quantized() -> LongLiveTransformer3DModel:
    return quantize_model(tiny_transformer(**FULL_SIZE), NVFP4Config())


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("make", [tiny_transformer, quantized])
def test_a_network_with_a_lora_is_not_saved(tmp_path, make, fuses):
    pipe = tiny_pipeline(transformer=make())
    pipe.transformer.add_adapter(LORA)
    if fuses:
        pipe.transformer.fuse_lora()
    for saved in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match=r"6 layers have a LoRA, for instance blocks\.0"):
            saved.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())

    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(tmp_path / "saved")
    loaded = LongLiveTransformer3DModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_a_network_with_fused_projections_is_not_saved(tmp_path):
    pipe = tiny_pipeline()
    pipe.transformer.fuse_qkv_projections()
    for saved in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match=r"4 layers have fused projections, for instance blocks\.0\.attn1"):
            saved.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    pipe.transformer.unfuse_qkv_projections()
    pipe.save_pretrained(tmp_path / "saved")
    assert LongLivePipeline.from_pretrained(tmp_path / "saved").transformer is not None


def test_fused_projections_take_no_lora(tmp_path):
    file = save_toy_lora(tmp_path, seed=1)
    pipe = tiny_pipeline()
    before = pipe.transformer.state_dict().keys()
    pipe.transformer.fuse_qkv_projections()
    state_dict = LongLivePipeline.lora_state_dict(file)
    for load in (
        lambda: pipe.load_lora_weights(file),
        lambda: pipe.transformer.load_lora_adapter(state_dict),
        lambda: pipe.transformer.add_adapter(LORA),
    ):
        with pytest.raises(ValueError, match=r"4 layers have fused projections, .* a LoRA would be left out"):
            load()
    pipe.transformer.unfuse_qkv_projections()
    assert pipe.transformer.state_dict().keys() == before
    pipe.transformer.add_adapter(LORA)
