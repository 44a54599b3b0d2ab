import shutil

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import save_file

from longlive_diffusers.loaders import (
    check_lora_fits,
    is_original_lora,
    load_original_transformer,
    read_original_lora,
    read_original_state_dict,
)
from longlive_diffusers.models.transformer_longlive import LongLiveTransformer3DModel


@pytest.fixture(scope="module")
def stored(golden) -> dict[str, torch.Tensor]:
    """The golden LoRA's own tensors: {base_model.model.blocks.0.self_attn.q.lora_A.weight: ...}."""
    return torch.load(golden / "lora.pt", weights_only=True)["generator_lora"]


@pytest.fixture(scope="module")
def expected(golden) -> dict[str, torch.Tensor]:
    return read_original_lora(golden / "lora.pt")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class LoraHost(WanLoraLoaderMixin):
    """What diffusers' LoRA mixin needs of a pipeline."""

    def __init__(self, transformer):
        self.transformer = transformer
        self.components = {"transformer": transformer}
        self.hf_device_map = None


def merged(original, stored, scale=1.0):
    """W + scale * B A, computed here from the reference's names."""
    state = dict(original)
    for key, down in stored.items():
        if ".lora_A." in key:
            up = stored[key.replace(".lora_A.", ".lora_B.")]
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            state[name] = state[name] + scale * up @ down
    return read_original_state_dict(state)


def test_layout(stored, expected):
    assert len(expected) == len(stored) == 40
    assert all(key.startswith("transformer.blocks.") for key in expected)
    name = "base_model.model.blocks.1.cross_attn.o.lora_B.weight"
    assert torch.equal(expected["transformer.blocks.1.attn2.to_out.0.lora_B.weight"], stored[name])
    assert expected["transformer.blocks.0.ffn.net.2.lora_A.weight"].shape == (8, 256)


VARIANTS = {
    "bare": lambda state: state,
    "with critic": lambda state: {"generator_lora": state, "critic_lora": {"x": torch.zeros(1)}, "step": 7},
    "state_dict": lambda state: {"state_dict": state},
    "nested": lambda state: {"generator": {"model": state}},
    "adapter name": lambda state: {k.replace(".weight", ".default.weight"): t for k, t in state.items()},
    "other adapter name": lambda state: {k.replace(".weight", ".generator.weight"): t for k, t in state.items()},
    "fsdp": lambda state: {k.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t for k, t in state.items()},
    "compiled": lambda state: {f"module._orig_mod.{k}": t for k, t in state.items()},
    "wrapper": lambda state: {f"model.{k}": t for k, t in state.items()},
    "no prefix": lambda state: {k.removeprefix("base_model.model."): t for k, t in state.items()},
}


@pytest.mark.parametrize("vary", VARIANTS.values(), ids=VARIANTS)
def test_wrappers_prefixes_and_infixes(tmp_path, stored, expected, vary):
    content = vary(stored)
    torch.save(content, tmp_path / "lora.pt")
    for checkpoint in (content, tmp_path / "lora.pt", str(tmp_path / "lora.pt")):
        assert is_original_lora(checkpoint)
        assert_equal(read_original_lora(checkpoint), expected)


def test_safetensors(tmp_path, stored, expected):
    save_file(stored, tmp_path / "adapter_model.safetensors")
    assert is_original_lora(tmp_path / "adapter_model.safetensors")
    assert_equal(read_original_lora(tmp_path / "adapter_model.safetensors"), expected)


def test_layers_outside_of_the_blocks():
    names = {
        "head.head": "proj_out",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    }
    lora = {f"base_model.model.{name}.lora_{half}.weight": torch.ones(4, 4) for name in names for half in "AB"}
    assert set(read_original_lora(lora)) == {
        f"transformer.{name}.lora_{half}.weight" for name in names.values() for half in "AB"
    }


# Alpha


def test_alpha_is_multiplied_into_lora_b(stored, expected):
    scaled = {key: tensor * 2 if ".lora_B." in key else tensor for key, tensor in expected.items()}
    per_layer = {k.replace(".lora_A.weight", ".alpha"): torch.tensor(16.0) for k in stored if ".lora_A." in k}
    for found in (
        read_original_lora(stored, alpha=16),
        read_original_lora({"generator_lora": stored, "alpha": 16}),
        read_original_lora({"generator_lora": stored, "lora_config": {"r": 8, "lora_alpha": 16}}),
        read_original_lora({"generator_lora": stored, "adapter": {"rank": 8, "alpha": 16.0}}),
        read_original_lora({**stored, **per_layer}),
        read_original_lora({"generator_lora": stored, "alpha": 16}, alpha=16),
    ):
        assert_equal(found, scaled)
    assert_equal(read_original_lora(stored, alpha=8), expected)


def test_rank_stabilised_alpha(stored, expected):
    found = read_original_lora({"generator_lora": stored, "lora_config": {"lora_alpha": 8, "use_rslora": True}})
    name = "transformer.blocks.0.attn1.to_q.lora_B.weight"
    torch.testing.assert_close(found[name], expected[name] * 8**0.5)


def test_contradicting_alpha(stored):
    with pytest.raises(ValueError, match=r"says alpha=8 .* alpha=16 was given"):
        read_original_lora({"generator_lora": stored, "alpha": 8}, alpha=16)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "16", True, [16], torch.tensor(16.0)], ids=repr)
def test_a_given_alpha_that_is_no_finite_number_is_refused(stored, alpha):
    """As one that is stored is: weights of NaN would come of it."""
    with pytest.raises(ValueError, match=r"argument says alpha=.* for all layers; a finite number is expected"):
        read_original_lora(stored, alpha=alpha)


def test_a_given_alpha_may_be_numpys(stored):
    assert_equal(read_original_lora(stored, alpha=np.float32(16)), read_original_lora(stored, alpha=16))


# With diffusers


@pytest.mark.parametrize("model_class", [LongLiveTransformer3DModel, WanTransformer3DModel])
@pytest.mark.parametrize("alpha", [None, 4])
def test_load_fuse_and_unload(original, stored, golden, heads, model_class, alpha):
    transformer = load_original_transformer(original, model_class=model_class, **heads)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    host = LoraHost(transformer)
    host.load_lora_weights(read_original_lora(golden / "lora.pt", alpha=alpha), adapter_name="longlive")
    assert sum("lora_A" in name for name, _ in transformer.named_parameters()) == 20
    host.unload_lora_weights()
    assert_equal(transformer.state_dict(), before)

    host.load_lora_weights(read_original_lora(golden / "lora.pt", alpha=alpha))
    host.fuse_lora(components=["transformer"])
    host.unload_lora_weights()
    fused = merged(original, stored, scale=1.0 if alpha is None else alpha / 8)
    found = transformer.state_dict()
    assert found.keys() == fused.keys()
    for name, tensor in fused.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found["blocks.0.attn1.to_q.weight"], before["blocks.0.attn1.to_q.weight"])


def test_a_mixed_precision_lora_keeps_its_dtype(stored):
    half = {key: tensor.bfloat16() for key, tensor in stored.items()}
    assert {tensor.dtype for tensor in read_original_lora(half, alpha=4).values()} == {torch.bfloat16}


# What is not an original LoRA


def test_other_layouts_are_left_to_diffusers(tmp_path, golden, original, stored, expected, wan_base):
    diffusion_model = {key.replace("base_model.model.", "diffusion_model."): t for key, t in stored.items()}
    musubi = {"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.zeros(4, 4)}
    for other in (expected, diffusion_model, musubi, original, {}, {"generator": original}):
        assert not is_original_lora(other)
    save_file(expected, tmp_path / "pytorch_lora_weights.safetensors")
    assert not is_original_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert not is_original_lora(golden / "model_bf16.pt")
    for other in (tmp_path, "someone/a-lora", "nothing.pt", wan_base / "model_index.json"):
        assert not is_original_lora(other)


# Refusals


def changed(stored, key, tensor):
    return {**stored, f"base_model.model.blocks.0.self_attn.{key}": tensor}


def test_empty_lora(tmp_path):
    torch.save({"generator_lora": {}, "critic_lora": {}, "step": 0}, tmp_path / "lora.pt")
    assert is_original_lora(tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora\.pt holds an empty LoRA"):
        read_original_lora(tmp_path / "lora.pt")


def test_not_a_lora(golden, original):
    with pytest.raises(ValueError, match=r"model_bf16\.pt is not a LoRA of this model: none of its 69 keys"):
        read_original_lora(golden / "model_bf16.pt")
    with pytest.raises(ValueError, match="not a LoRA"):
        read_original_lora({"base_model.model.double_blocks.0.lora_A.weight": torch.zeros(2, 2)})


def test_rank_of_a_pair_disagrees(stored):
    with pytest.raises(ValueError, match=r"lora_A \(7, 128\) and lora_B \(128, 8\) of blocks\.0\.self_attn\.q"):
        read_original_lora(changed(stored, "q.lora_A.weight", torch.zeros(7, 128)))
    with pytest.raises(ValueError, match=r"lora_A \(8,\)"):
        read_original_lora(changed(stored, "q.lora_A.weight", torch.zeros(8)))


def test_rank_0(stored, expected, original):
    empty = changed(stored, "q.lora_A.weight", torch.zeros(0, 128))
    empty = changed(empty, "q.lora_B.weight", torch.zeros(128, 0))
    with pytest.raises(ValueError, match=r"self_attn\.q has rank 0 \(\(0, 128\) and \(128, 0\)\)"):
        read_original_lora(empty)
    all_empty = {key: t[:0] if ".lora_A." in key else t[:, :0] for key, t in expected.items()}
    with pytest.raises(ValueError, match=r"does not fit in 20 layers: \S+ has rank 0: lora_A \(0, \d+\)"):
        check_lora_fits(all_empty, read_original_state_dict(original))


def test_ranks_of_layers_disagree(stored):
    mixed = changed(stored, "q.lora_A.weight", torch.zeros(4, 128))
    with pytest.raises(ValueError, match=r"rank 8 in 19 layers, rank 4 in 1 layer"):
        read_original_lora(changed(mixed, "q.lora_B.weight", torch.zeros(128, 4)))


def test_half_a_layer(stored):
    half = {key: tensor for key, tensor in stored.items() if not key.endswith("blocks.1.ffn.0.lora_B.weight")}
    with pytest.raises(ValueError, match=r"1 layer without lora_A or lora_B: blocks\.1\.ffn\.0"):
        read_original_lora(half)


@pytest.mark.parametrize("key", ["q.lora_magnitude_vector.weight", "q.lora_B.bias", "q.weight"])
def test_more_than_plain_layers(stored, key):
    with pytest.raises(ValueError, match=r"holds 1 key of no plain LoRA layer"):
        read_original_lora(changed(stored, key, torch.zeros(128)))


def test_two_adapters_in_one_file(stored):
    second = {key.replace(".weight", ".second.weight"): tensor for key, tensor in stored.items()}
    with pytest.raises(ValueError, match="several adapters"):
        read_original_lora({**stored, **second})


def test_integers(stored):
    with pytest.raises(ValueError, match=r"torch\.int64"):
        read_original_lora(changed(stored, "q.lora_A.weight", torch.zeros(8, 128, dtype=torch.int64)))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.999])
def test_truncated(tmp_path, golden, part):
    path = tmp_path / "lora.pt"
    shutil.copy(golden / "lora.pt", path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    for read in (read_original_lora, is_original_lora):
        with pytest.raises(ValueError, match=r"lora\.pt \(\d+ bytes\)"):
            read(path)
    with pytest.raises(ValueError, match="no checkpoint file"):
        read_original_lora(tmp_path / "missing.pt")


def test_lora_of_another_model(expected, original):
    weights = read_original_state_dict(original)
    check_lora_fits(expected, weights)
    deeper = {key.replace("blocks.1.", "blocks.29."): tensor for key, tensor in expected.items()}
    with pytest.raises(ValueError, match=r"does not fit in 10 layers: blocks\.29\.\S+ does not exist"):
        check_lora_fits(deeper, weights)
    wider = {key: torch.zeros(8, 3072) if ".lora_A." in key else t for key, t in expected.items()}
    with pytest.raises(ValueError, match=r"does not fit in 20 layers: \S+ is \(128, 128\), its LoRA \(128, 3072\)"):
        check_lora_fits(wider, weights)
