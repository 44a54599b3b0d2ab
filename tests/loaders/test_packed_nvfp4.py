"""The reference's packed NVFP4 checkpoints."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.conversion.convert import convert_checkpoint
from longlive_diffusers.loaders.original import rename_to_diffusers
from longlive_diffusers.nvfp4 import nvfp4_layers


LAYER = "model.blocks.0.self_attn.q.quantized_weight_"


@pytest.fixture
def packed(golden) -> dict:
    return torch.load(golden / "model_4o6.pt", weights_only=True)


@pytest.fixture(scope="module")
def expected(golden) -> dict[str, torch.Tensor]:
    """The dequantized weights that the reference makes of it."""
    return rename_to_diffusers(load_file(golden / "model_4o6_dequantized.safetensors"))


def check(model: LongLiveTransformer3DModel, expected: dict[str, torch.Tensor]) -> None:
    layers = nvfp4_layers(model)
    assert {f"{name}.weight" for name in layers} == set(expected)
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(torch.float32), expected[f"{name}.weight"])


def test_every_weight_is_what_the_reference_makes_of_it(golden, heads, expected, tmp_path):
    model = LongLiveTransformer3DModel.from_original(golden / "model_4o6.pt", **heads)
    check(model, expected)
    model.save_pretrained(tmp_path / "saved")
    check(LongLiveTransformer3DModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16), expected)
    quantization = model.config.quantization_config
    assert (quantization.weight_scale_rule, quantization.activation_scale_rule) == ("mse", "mse")


def test_it_runs_as_its_dequantised_weights_do(golden, heads):
    model = LongLiveTransformer3DModel.from_original(golden / "model_4o6.pt", chunk_size=2, **heads)
    for layer in nvfp4_layers(model).values():
        layer.set_backend("w4a16")
    latents, text = torch.randn(1, 8, 4, 4, 4), torch.randn(1, 16, 32)
    with torch.no_grad():
        packed = model(latents, torch.tensor([500.0]), text).sample
        dense = model.dequantize()(latents, torch.tensor([500.0]), text).sample
    torch.testing.assert_close(packed, dense, atol=1e-5, rtol=1e-5)


def test_amax_without_dimensions_as_a_cpu_writes_it(packed, heads, expected):
    for key in list(packed["generator"]):
        if key.endswith("amax"):
            packed["generator"][key] = packed["generator"][key].squeeze()
    check(LongLiveTransformer3DModel.from_original(packed, **heads), expected)


def test_copies_for_training_are_left_out(packed, heads, expected):
    packed["generator"][f"{LAYER.replace('weight_', 'weight_transposed_')}values"] = torch.zeros(3)
    check(LongLiveTransformer3DModel.from_original(packed, **heads), expected)


def test_the_rule_has_to_be_known(packed, heads, expected):
    bare = packed["generator"]
    with pytest.raises(ValueError, match=r"does not say by which rule.*Give weight_scale_rule"):
        LongLiveTransformer3DModel.from_original(bare, **heads)
    check(LongLiveTransformer3DModel.from_original(bare, weight_scale_rule="mse", **heads), expected)
    with pytest.raises(ValueError, match="by the rule 'static_6' it would be 448"):
        LongLiveTransformer3DModel.from_original(bare, weight_scale_rule="static_6", **heads)
    with pytest.raises(ValueError, match="by the rule 'mse', weight_scale_rule='static_6' was given"):
        LongLiveTransformer3DModel.from_original(packed, weight_scale_rule="static_6", **heads)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("amax", None, r"blocks\.0\.self_attn\.q has no quantized_weight_amax"),
        ("scale_factors", lambda scales: scales[:-512], "1024, got 512"),
        ("scale_factors", lambda scales: scales.bfloat16(), r"scales are torch\.bfloat16"),
        ("values", lambda values: values[:-1], r"its values are \(127, 64\)"),
        ("metadata", lambda sizes: sizes[:3], r"4 whole numbers .* \(3,\)"),
        ("amax", lambda amax: amax * torch.nan, "amax"),
    ],
)
def test_damaged(packed, heads, part, change, message):
    key = f"{LAYER}{part}"
    if change is None:
        del packed["generator"][key]
    else:
        packed["generator"][key] = change(packed["generator"][key])
    with pytest.raises(ValueError, match=message):
        LongLiveTransformer3DModel.from_original(packed, **heads)


def test_converted_it_stays_packed(golden, wan_base, heads, expected, tmp_path):
    convert_checkpoint(golden / "model_4o6.pt", wan_base, tmp_path / "out", **heads)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    check(pipe.transformer, expected)


def test_a_lora_is_fused_into_it(golden, wan_base, heads, expected, tmp_path):
    convert_checkpoint(golden / "model_4o6.pt", wan_base, tmp_path / "out", lora=golden / "lora.pt", **heads)
    layers = nvfp4_layers(DiffusionPipeline.from_pretrained(tmp_path / "out").transformer)
    changed = [
        name
        for name, layer in layers.items()
        if not torch.equal(layer.dequantize(torch.float32), expected[f"{name}.weight"])
    ]
    assert len(changed) == len(layers) == len(expected)
