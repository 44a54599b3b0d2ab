"""A LoRA in the reference's layout: what the reference reads, and what comes back."""

import re

import pytest
import torch
from torch import nn

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.loaders import is_original_lora, original_lora_state_dict, read_original_lora
from tests.support.toy_checkpoints import original_name, toy_transformer
from tests.support.toy_loras import save_toy_lora


RANK = 4
# All that can carry a LoRA: the Linear layers, in the blocks and outside of them.
LAYERS = {name: layer for name, layer in toy_transformer().named_modules() if isinstance(layer, nn.Linear)}


def lora_of(layers: dict[str, nn.Linear], rank: int = RANK, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, layer in layers.items():
        down = torch.randn(rank, layer.in_features, generator=generator)
        up = torch.randn(layer.out_features, rank, generator=generator)
        lora |= {
            f"transformer.{name}.lora_A.weight": down.to(dtype),
            f"transformer.{name}.lora_B.weight": up.to(dtype),
        }
    return lora


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)


def test_the_golden_file_of_the_reference_is_reproduced(golden):
    stored = torch.load(golden / "lora.pt", weights_only=True)["generator_lora"]
    written = original_lora_state_dict(read_original_lora(golden / "lora.pt"))
    assert written.keys() == {"generator_lora"}
    assert_equal(written["generator_lora"], stored)


def test_every_layer_has_wans_name():
    written = original_lora_state_dict(lora_of(LAYERS))["generator_lora"]
    assert len(LAYERS) == 5 * 10 + 6
    for name in LAYERS:
        wan = original_name(f"{name}.weight").removesuffix(".weight")
        assert {f"base_model.model.{wan}.lora_{half}.weight" for half in "AB"} <= written.keys()


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_comes_back_also_by_itself(name):
    lora = lora_of({name: LAYERS[name]})
    written = original_lora_state_dict(lora)
    assert is_original_lora(written)
    assert_equal(read_original_lora(written), lora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_lora_comes_back_bit_for_bit(dtype):
    lora = lora_of(LAYERS, dtype=dtype)
    written = original_lora_state_dict(lora)
    assert_equal(read_original_lora(written), lora)
    assert_equal(LongLivePipeline.lora_state_dict(written), lora)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": RANK}, 1.0),
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 3.0}, 0.75),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 16}}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"to_k": 16}}, 2.0),
    ],
)
def test_another_alpha_is_multiplied_into_lora_b(settings, scale):
    name = "blocks.0.attn1.to_q"
    lora = lora_of({name: LAYERS[name]})
    metadata = {f"transformer.{key}": value for key, value in {"r": RANK, **settings}.items()}
    found = read_original_lora(original_lora_state_dict(lora, metadata))
    assert torch.equal(found[f"transformer.{name}.lora_A.weight"], lora[f"transformer.{name}.lora_A.weight"])
    assert torch.equal(found[f"transformer.{name}.lora_B.weight"], scale * lora[f"transformer.{name}.lora_B.weight"])


@pytest.mark.parametrize("alpha", [16, 24])
def test_the_exported_lora_does_what_the_saved_one_does(tmp_path, alpha):
    file = save_toy_lora(tmp_path, seed=0, alpha=alpha)
    state, metadata = LongLivePipeline.lora_state_dict(file, return_lora_metadata=True)
    exported = read_original_lora(original_lora_state_dict(state, metadata))
    scale = alpha / 16
    for name in ("transformer.blocks.4.ffn.net.0.proj", "transformer.blocks.0.attn2.to_out.0"):
        expected = scale * state[f"{name}.lora_B.weight"].float() @ state[f"{name}.lora_A.weight"].float()
        found = exported[f"{name}.lora_B.weight"].float() @ exported[f"{name}.lora_A.weight"].float()
        assert (found - expected).norm() < 2**-11 * expected.norm()  # lora_B is rounded to float16 once more, or not


QUERY = "blocks.0.attn1.to_q"


def changed(name: str, tensor: torch.Tensor | None, *, layer: str = QUERY) -> dict[str, torch.Tensor]:
    lora = lora_of({QUERY: LAYERS[QUERY], "blocks.1.attn1.to_q": LAYERS[QUERY]})
    key = f"transformer.{layer}.{name}"
    return {k: t for k, t in lora.items() if k != key} | ({} if tensor is None else {key: tensor})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({}, "The LoRA holds an empty LoRA: there is no tensor in it"),
        (changed("lora_B.weight", None), "1 layer without lora_A or lora_B: blocks.0.attn1.to_q"),
        (changed("lora_B.weight", torch.zeros(192, 5)), "lora_A (4, 192) and lora_B (192, 5) of blocks.0.attn1"),
        (changed("lora_B.bias", torch.zeros(192)), "1 key of no plain LoRA layer: transformer.blocks.0.attn1"),
        (changed("lora_magnitude_vector", torch.zeros(192)), "1 key of no plain LoRA layer"),
        (changed("lora_B.weight", torch.full((192, 4), torch.nan)), "768 infinities or NaN among its 768 numbers"),
        (
            lora_of({QUERY: LAYERS[QUERY]}) | lora_of({"blocks.1.attn1.to_q": LAYERS[QUERY]}, rank=8),
            "the layers' ranks disagree (rank 4 in 1 layer, rank 8 in 1 layer)",
        ),
        (lora_of({"blocks.0.attn1.to_qkv": LAYERS[QUERY]}), "blocks.0.attn1.to_qkv, which has no counterpart"),
        (lora_of({"blocks.0.attn2.add_k_proj": LAYERS[QUERY]}), "blocks.0.attn2.add_k_proj, which has no counterpart"),
        ({"text_encoder.q.lora_A.weight": torch.zeros(4, 4)}, "none of its 1 keys is"),
    ],
)
def test_what_the_reference_has_no_place_for_raises(lora, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        original_lora_state_dict(lora)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8, "lora_alpha": 8}, r"settings say rank 8 \(r\), its layers have rank 4"),
        ({"r": RANK, "lora_alpha": "many"}, "alpha='many'"),
        ({"r": RANK, "lora_alpha": float("nan")}, "alpha=nan"),
    ],
)
def test_settings_that_contradict_the_layers_raise(settings, message):
    metadata = {f"transformer.{key}": value for key, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        original_lora_state_dict(lora_of({QUERY: LAYERS[QUERY]}), metadata)
