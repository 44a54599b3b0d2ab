"""LoRA on layers in NVFP4: what is fused, and what is refused before anything has changed."""

import pytest
import torch
from peft import LoKrConfig, LoraConfig
from peft.utils import get_peft_model_state_dict

from longlive_diffusers import LongLiveTransformer3DModel, NVFP4Config
from longlive_diffusers.loaders import check_lora_fits
from longlive_diffusers.nvfp4 import NVFP4Linear, quantize_model
from longlive_diffusers.nvfp4.linear import weights_of
from longlive_diffusers.nvfp4.lora import NVFP4LoraLinear
from tests.support.nvfp4_models import small_pipeline, small_transformer
from tests.support.tiny_pipeline import random_inputs


TARGETS = ["to_q", "to_k", "net.2"]


def quantized(model: LongLiveTransformer3DModel | None = None, **settings) -> LongLiveTransformer3DModel:
    return quantize_model(model or small_transformer(), NVFP4Config(backend="w4a16", **settings))


def config(**settings) -> LoraConfig:
    torch.manual_seed(0)  # of the weights that `add_adapter` draws
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **settings})


def with_bias_lora(model, name: str = "default", **settings) -> LongLiveTransformer3DModel:
    model.add_adapter(config(lora_bias=True, **settings), name)
    for layer, parameter in model.named_parameters():
        if layer.endswith(f"lora_B.{name}.bias"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)


@torch.no_grad()
def test_biases_of_a_lora_are_fused():
    model = with_bias_lora(quantized(), lora_alpha=8)
    layer, inputs = model.blocks[0].attn1.to_q, random_inputs()
    expected = layer.get_base_layer().bias + 2 * layer.lora_B["default"].bias
    before = model(**inputs).sample
    model.fuse_lora()
    assert torch.equal(layer.get_base_layer().bias, expected)
    after = model(**inputs).sample
    assert (after - before).norm() / before.norm() < 0.1


@torch.no_grad()
def test_biases_of_several_adapters_are_fused_by_their_scales():
    model = with_bias_lora(with_bias_lora(quantized(), "one"), "two")
    model.set_adapters(["one", "two"], [0.5, 0.25])
    layer = model.blocks[1].ffn.net[2]
    scaled = [layer.scaling[name] * layer.lora_B[name].bias for name in ("one", "two")]
    expected = layer.get_base_layer().bias + scaled[0] + scaled[1]
    model.fuse_lora(adapter_names=["one", "two"])
    torch.testing.assert_close(layer.get_base_layer().bias, expected)


def test_a_bias_for_a_layer_without_one_is_refused():
    plain = small_transformer()
    plain.blocks[1].attn1.to_q.bias = None
    model = quantized(plain)
    with pytest.warns(UserWarning, match="has no bias"):
        with_bias_lora(model)
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attn1\.to_q: adapter 'default' has a bias, and the layer has none"
    ):
        model.fuse_lora()
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A.default.weight", "lora_B.default.weight", "lora_B.default.bias"])
def test_a_lora_that_is_not_finite_in_a_late_layer_fuses_nothing(part, value):
    """What was fused before could not be taken out again."""
    model = with_bias_lora(quantized())
    model.blocks[1].ffn.net[2].get_parameter(part).data[0] = value
    before = state_of(model)
    with pytest.raises(ValueError, match=r"1 layer cannot be fused.*blocks\.1\.ffn\.net\.2.*infinities or NaN"):
        model.fuse_lora()
    assert_unchanged(model, before)


@torch.no_grad()
def test_a_fused_lora_is_unloaded_before_the_weights_are_dequantized():
    model = quantized()
    for name in ("one", "two"):
        model.add_adapter(config(), name)
    model.fuse_lora(adapter_names=["one"])
    before = state_of(model)
    with pytest.raises(ValueError, match=r"10 layers in NVFP4 have a fused LoRA, .* call `unload_lora_weights\(\)`"):
        model.dequantize()
    assert_unchanged(model, before)
    expected = model(**random_inputs()).sample
    model.unload_lora()
    model.dequantize()
    torch.testing.assert_close(model(**random_inputs()).sample, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_dequantized_takes_loras_as_any_other():
    """Also layers of an adapter that was to be fused, of which nothing was."""
    model = quantized()
    model.add_adapter(config(), "one")
    model.fuse_lora(adapter_names=[])
    model.dequantize()
    assert not any(isinstance(layer, NVFP4LoraLinear) for layer in model.modules())
    expected = model(**random_inputs()).sample
    model.fuse_lora(adapter_names=["one"])
    torch.testing.assert_close(model(**random_inputs()).sample, expected, atol=1e-4, rtol=1e-4)
    model.unfuse_lora()
    torch.testing.assert_close(model(**random_inputs()).sample, expected, atol=1e-4, rtol=1e-4)


def test_other_adapters_than_lora_are_refused_before_they_touch_the_codes():
    model = quantized()
    model.add_adapter(LoKrConfig(r=4, target_modules=TARGETS, init_weights=False))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"10 layers cannot be fused.*takes plain LoRAs only"):
        model.fuse_lora()
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"use_dora": True, "target_modules": "all-linear"},
        {"use_dora": True, "target_modules": r".*attn1\.to_q"},
    ],
    ids=str,
)
def test_a_lora_that_reads_the_weight_is_refused(settings):
    model = quantized()
    before = state_of(model)
    with pytest.raises(ValueError, match="takes plain LoRAs only") as raised:
        model.add_adapter(config(**settings))
    assert "\n" not in str(raised.value)
    assert_unchanged(model, before)


def test_a_dora_of_layers_that_stayed_as_they_were_is_taken():
    model = quantized(modules_to_not_convert=["condition_embedder", "proj_out", "attn1"])
    model.add_adapter(config(use_dora=True, target_modules=["attn1.to_q"]))
    assert isinstance(model.blocks[0].attn1.to_k, torch.nn.Linear)
    assert isinstance(model.blocks[0].attn2.to_q, NVFP4Linear)


@pytest.fixture(scope="module")
def dora() -> dict[str, torch.Tensor]:
    plain = small_transformer()
    plain.add_adapter(config(use_dora=True))
    state = get_peft_model_state_dict(plain)
    assert any("lora_magnitude_vector" in key for key in state)
    return {f"transformer.{key}": tensor for key, tensor in state.items()}


WAYS_IN = {
    "pipeline": lambda model, dora: small_pipeline(transformer=model).load_lora_weights(dora),
    "network": lambda model, dora: model.load_lora_adapter(dora),
    "network without prefix": lambda model, dora: model.load_lora_adapter(
        {key.removeprefix("transformer."): tensor for key, tensor in dora.items()}, prefix=None
    ),
    "check": lambda model, dora: check_lora_fits(dora, weights_of(model)),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_dora_from_a_file_is_refused(dora, way):
    model = quantized()
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"The LoRA is a DoRA; .* in NVFP4, and a layer in NVFP4 takes plain LoRAs only"
    ):
        WAYS_IN[way](model, dora)
    assert_unchanged(model, before)


def test_a_dora_is_refused_beside_a_lora_too(dora):
    model = quantized()
    model.add_adapter(config(), "plain")
    for add in (lambda: model.add_adapter(config(use_dora=True), "dora"), lambda: model.load_lora_adapter(dora)):
        with pytest.raises(ValueError, match="takes plain LoRAs only"):
            add()


@torch.no_grad()
def test_a_dora_of_plain_layers_is_loaded_and_fused(dora):
    pipe = small_pipeline()
    pipe.load_lora_weights(dora)
    before = pipe.transformer(**random_inputs()).sample
    pipe.fuse_lora(components=["transformer"])
    torch.testing.assert_close(pipe.transformer(**random_inputs()).sample, before, atol=1e-5, rtol=1e-5)
