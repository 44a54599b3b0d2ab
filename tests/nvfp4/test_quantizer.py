"""NVFP4 through diffusers: loading, saving, sharing, what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoModel, DiffusionPipeline, PipelineQuantizationConfig
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longlive_diffusers import LongLiveTransformer3DModel, NVFP4Config
from longlive_diffusers.nvfp4 import NVFP4Linear, nvfp4_layers, quantize_model
from longlive_diffusers.nvfp4.quantizer import layers_to_convert
from tests.support.nvfp4_models import NUM_LAYERS, small_pipeline, small_transformer
from tests.support.paths import ROOT
from tests.support.tiny_pipeline import random_inputs, tiny_arguments


WEIGHTS = "diffusion_pytorch_model.safetensors"


def as_bytes(weights: torch.nn.Module | dict[str, torch.Tensor]) -> dict[str, tuple]:
    if isinstance(weights, torch.nn.Module):
        weights = weights.state_dict()
    return {
        name: (tensor.dtype, tensor.contiguous().view(-1).view(torch.uint8).tolist())
        for name, tensor in weights.items()
    }


@pytest.fixture
def plain_folder(tmp_path):
    small_transformer().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def quantized_folder(tmp_path):
    quantize_model(small_transformer(), NVFP4Config()).save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_when_loaded_and_loaded_again_bit_for_bit(plain_folder, tmp_path, dtype):
    model = LongLiveTransformer3DModel.from_pretrained(plain_folder, quantization_config=NVFP4Config(), dtype=dtype)
    layers = nvfp4_layers(model)
    assert len(layers) == NUM_LAYERS and all(name.startswith("blocks.") for name in layers)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(str(tmp_path / "saved"), dtype=dtype)
    assert as_bytes(again) == as_bytes(model)
    assert repr(again) == repr(model)


def test_quantised_when_loaded_or_afterwards_is_the_same(plain_folder):
    loaded = LongLiveTransformer3DModel.from_pretrained(plain_folder, quantization_config=NVFP4Config())
    converted = quantize_model(LongLiveTransformer3DModel.from_pretrained(plain_folder), NVFP4Config())
    assert as_bytes(loaded) == as_bytes(converted)


def test_a_file_says_what_it_holds(quantized_folder):
    with safe_open(quantized_folder / WEIGHTS, "pt") as file:
        described = json.loads(file.metadata()["longlive_nvfp4"])
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dictionary
    assert described["format"] == "nvfp4" and described["weight_scale_rule"] == "mse"
    assert dtypes == {"F32", "U8", "F8_E4M3"}
    config = json.loads((quantized_folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "longlive_nvfp4"


def test_a_pipeline_is_quantised_when_it_is_loaded(tmp_path):
    plain = small_pipeline()
    plain.save_pretrained(tmp_path / "plain")
    wish = PipelineQuantizationConfig(quant_mapping={"transformer": NVFP4Config(backend="w4a16")})
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "plain", quantization_config=wish)
    pipe.set_progress_bar_config(disable=True)
    assert len(nvfp4_layers(pipe.transformer)) == NUM_LAYERS
    latents = pipe(**tiny_arguments()).frames
    assert 0 < (latents - plain(**tiny_arguments()).frames).norm() / latents.norm() < 0.1


PUSH = """
import sys
from diffusers import DiffusionPipeline
import longlive_diffusers
DiffusionPipeline.from_pretrained(sys.argv[1]).push_to_hub("someone/quantized")
"""
PULL = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from diffusers import DiffusionPipeline
import longlive_diffusers
from tests.support.tiny_pipeline import tiny_arguments
pipe = DiffusionPipeline.from_pretrained("someone/quantized")
torch.save((pipe.transformer.state_dict(), pipe(**tiny_arguments()).frames), "pulled.pt")
"""


def test_a_quantised_pipeline_goes_to_the_hub_and_comes_back(hub, tmp_path):
    pipe = small_pipeline(transformer=quantize_model(small_transformer(), NVFP4Config()))
    pipe.save_pretrained(tmp_path / "saved")
    hub.run_python(PUSH, str(tmp_path / "saved"), cache="pusher")
    assert not any(str(tmp_path).encode() in content for content in hub.files("someone/quantized").values())
    hub.run_python(PULL, str(ROOT), cache="puller")
    weights, latents = torch.load(hub.folder / "pulled.pt")
    assert as_bytes(weights) == as_bytes(pipe.transformer.state_dict())
    assert torch.equal(latents, pipe(**tiny_arguments()).frames)


def test_modules_to_keep(plain_folder):
    config = NVFP4Config(modules_to_not_convert=["condition_embedder", "proj_out", "attn2", "blocks.1"])
    model = LongLiveTransformer3DModel.from_pretrained(plain_folder, quantization_config=config)
    assert sorted(nvfp4_layers(model)) == [
        "blocks.0.attn1.to_k", "blocks.0.attn1.to_out.0", "blocks.0.attn1.to_q", "blocks.0.attn1.to_v",
        "blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2",
    ]  # fmt: skip


def test_dequantised_it_is_a_plain_model_again(quantized_folder, tmp_path):
    model = LongLiveTransformer3DModel.from_pretrained(quantized_folder)
    layer = nvfp4_layers(model)["blocks.0.ffn.net.2"]
    model.dequantize()
    assert not nvfp4_layers(model)
    assert torch.equal(model.blocks[0].ffn.net[2].weight, layer.dequantize(torch.float32))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "plain_again")
    assert "quantization_config" not in json.loads((tmp_path / "plain_again" / "config.json").read_text())
    assert not nvfp4_layers(AutoModel.from_pretrained(str(tmp_path / "plain_again")))


def test_a_lora_trains_on_it_is_fused_and_rounded_again():
    model = quantize_model(small_transformer(), NVFP4Config(backend="w4a16"))
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "net.2"], init_lora_weights=False))
    inputs = random_inputs()
    model(**inputs).sample.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}

    layer = model.blocks[0].attn1.to_q
    expected = layer.get_base_layer().dequantize(torch.float32) + layer.get_delta_weight("default")
    with torch.no_grad():
        before = model(**inputs).sample
        model.fuse_lora()
        after = model(**inputs).sample
    fused = layer.get_base_layer().dequantize(torch.float32)
    assert 0 < (fused - expected).norm() / expected.norm() < 0.1  # rounded
    assert (after - before).norm() / before.norm() < 0.1
    with pytest.raises(ValueError, match="cannot be taken out"):
        model.unfuse_lora()


def test_two_adapters_are_rounded_once():
    model = quantize_model(small_transformer(), NVFP4Config())
    for name in ("one", "two"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name=name)
    model.set_adapters(["one", "two"])
    layer = model.blocks[0].attn1.to_q
    total = layer.get_base_layer().dequantize(torch.float32)
    for name in ("one", "two"):
        total = total + layer.get_delta_weight(name)
    model.fuse_lora(adapter_names=["one", "two"])
    linear = torch.nn.Linear(32, 32)
    linear.weight.data = total.detach()
    expected = NVFP4Linear.from_linear(linear)
    assert torch.equal(layer.get_base_layer().weight_codes, expected.weight_codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_scale_rule": "best"}, "'best'"),
        ({"activation_scale_rule": "best"}, "'best'"),
        ({"weight_block": (1, 32)}, r"\(1, 32\)"),
        ({"backend": "best"}, "'best'"),
        ({"quant_method": "gguf"}, "'gguf'"),
        ({"weight_scale_rule": ["mse"]}, r"got \['mse'\]"),
        ({"backend": None}, "got None"),
        ({"weight_block": 16}, "got 16"),
        ({"weight_block": "16x16"}, "got 16x16"),
        ({"modules_to_not_convert": [3]}, r"list of names of modules, got \[3\]"),
        ({"modules_to_not_convert": 3}, "list of names of modules, got 3"),
        ({"modules_to_not_convert": b"blocks"}, "list of names of modules, got b'blocks'"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        NVFP4Config(**arguments)


@pytest.mark.parametrize("names", ["attn1", ["attn1"], ("attn1",), {"attn1"}, iter(["attn1"])])
def test_a_string_is_one_name(names):
    config = NVFP4Config(modules_to_not_convert=names)
    assert config.modules_to_not_convert == ["attn1"]
    layers = nvfp4_layers(quantize_model(small_transformer(), config))
    assert layers and not any("attn1" in name for name in layers)


@pytest.mark.parametrize("kept", ["block", "blocks.", "blocks.2", "attn1.to_x", "", ".", "to_out.1.weight", "(", "*"])
def test_names_that_match_nothing_are_refused(kept):
    for names in (kept, ["attn1", kept]):
        with pytest.raises(ValueError, match=r"has no module .* to keep as it is") as raised:
            quantize_model(small_transformer(), NVFP4Config(modules_to_not_convert=names))
        assert repr(kept) in str(raised.value) and "attn2" in str(raised.value)


@pytest.mark.parametrize("kept", ["blocks.0", "0", "attn2.to_out", "to_out.0", "blocks.1.ffn.net.2", "norm1"])
def test_parts_of_names_between_dots_match(kept):
    quantize_model(small_transformer(), NVFP4Config(modules_to_not_convert=[kept]))


def test_default_names_may_be_missing():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    assert layers_to_convert(model, NVFP4Config()) == ["0"]


def test_settings_of_a_newer_release_are_named(quantized_folder):
    path = quantized_folder / "config.json"
    path.write_text(path.read_text().replace('"weight_scale_rule"', '"rotation": 3, "weight_scale_rule"'))
    with pytest.raises(ValueError, match="quantization_config has rotation, which NVFP4Config does not know"):
        LongLiveTransformer3DModel.from_pretrained(quantized_folder)


def test_models_that_cannot_be_quantised(plain_folder):
    model = quantize_model(small_transformer(), NVFP4Config())
    with pytest.raises(ValueError, match="in NVFP4 already"):
        quantize_model(model, NVFP4Config())
    nothing = NVFP4Config(modules_to_not_convert=["blocks", "condition_embedder", "proj_out"])
    with pytest.raises(ValueError, match="Nothing to quantize"):
        quantize_model(small_transformer(), nothing)
    with pytest.raises(ValueError, match="Nothing to quantize"):
        LongLiveTransformer3DModel.from_pretrained(plain_folder, quantization_config=nothing)
    with_lora = small_transformer()
    with_lora.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="LoRA"):
        quantize_model(with_lora, NVFP4Config())
    broken = small_transformer()
    broken.blocks[1].attn1.to_q.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1\.to_q cannot be quantized: 1 of 1024"):
        quantize_model(broken, NVFP4Config())


def change(folder, **changes):
    """Change tensors of a saved model; None removes one."""
    weights = load_file(folder / WEIGHTS)
    for name, make in changes.items():
        key = f"blocks.0.attn1.to_q.{name}"
        if make is None:
            del weights[key]
        else:
            weights[key] = make(weights[key])
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scales": None}, r"has no blocks\.0\.attn1\.to_q\.weight_scales"),
        ({"weight_codes": lambda codes: codes[:, :-1].contiguous()}, r"weight_codes is \(32, 15\).*\(32, 16\)"),
        ({"weight_scales": lambda scales: scales.float()}, r"weight_scales is torch\.float32"),
        ({"weight_amax": lambda amax: amax * torch.nan}, "amax"),
        ({"weight_scales": lambda scales: (-scales.float()).to(scales.dtype)}, "block scales are negative"),
    ],
)
def test_damaged_files(quantized_folder, changes, message):
    change(quantized_folder, **changes)
    with pytest.raises(ValueError, match=message):
        LongLiveTransformer3DModel.from_pretrained(quantized_folder)


def test_a_number_without_dimensions_is_taken(quantized_folder):
    change(quantized_folder, weight_amax=lambda amax: amax.squeeze())
    model = LongLiveTransformer3DModel.from_pretrained(quantized_folder)
    assert model.blocks[0].attn1.to_q.weight_amax.shape == (1,)


def test_a_wrong_rule_in_the_configuration_is_found_out(quantized_folder):
    path = quantized_folder / "config.json"
    path.write_text(path.read_text().replace('"weight_scale_rule": "mse"', '"weight_scale_rule": "static_6"'))
    with pytest.raises(ValueError, match=r"largest block scale is .* by the rule 'static_6' it would be 448:"):
        LongLiveTransformer3DModel.from_pretrained(quantized_folder)


def cast_layers(model) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)


def offload_layers(model) -> None:
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def offload_sequentially(model) -> None:
    cpu_offload(model, torch.device("cpu"))


def watch_a_layer(model) -> None:
    model.blocks[1].ffn.net[2].register_forward_hook(lambda layer, args, output: None)


def store_in_8_bits(model) -> None:
    model.blocks[1].ffn.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (cast_layers, NUM_LAYERS),
        (offload_layers, NUM_LAYERS),
        (offload_sequentially, NUM_LAYERS),
        (watch_a_layer, 1),
        (store_in_8_bits, 2),
    ],
)
def test_layers_that_do_more_than_multiply_are_refused(change, count):
    """Their hooks would be lost, and a weight that waits in 8 bits, or nowhere, is not what they multiply by."""
    model = small_transformer()
    change(model)
    with pytest.raises(ValueError, match=rf"{count} layers have hooks or .* quantize the model before"):
        quantize_model(model, NVFP4Config())
    assert not nvfp4_layers(model)


@torch.no_grad()
def test_what_is_compiled_or_offloaded_as_a_whole_is_quantised():
    model = small_transformer()
    expected = quantize_model(small_transformer(), NVFP4Config())(**random_inputs()).sample
    cpu = torch.device("cpu")
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.enable_group_offload(onload_device=cpu, offload_type="block_level", num_blocks_per_group=1)
    quantize_model(model, NVFP4Config())
    assert len(nvfp4_layers(model)) == NUM_LAYERS
    torch.testing.assert_close(model(**random_inputs()).sample, expected)


def test_offloaded_it_gives_the_same(tmp_path):
    pipe = small_pipeline(transformer=quantize_model(small_transformer(), NVFP4Config()))
    expected = pipe(**tiny_arguments()).frames
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False
    )
    assert torch.equal(pipe(**tiny_arguments()).frames, expected)


WITHOUT = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["triton"] = sys.modules["transformer_engine"] = None  # as if they were not installed
from longlive_diffusers import NVFP4Config
from longlive_diffusers.nvfp4 import quantize_model
from tests.support.nvfp4_models import small_pipeline, small_transformer
from tests.support.tiny_pipeline import tiny_arguments
pipe = small_pipeline(transformer=quantize_model(small_transformer(), NVFP4Config()))
print(pipe(**tiny_arguments(kv_cache_dtype="nvfp4")).frames.shape)
"""


def test_it_works_without_triton_and_transformer_engine():
    run = subprocess.run([sys.executable, "-c", WITHOUT, str(ROOT)], capture_output=True, text=True, check=False)
    assert "torch.Size" in run.stdout, run.stderr


def test_bytes_of_the_5b_weights():
    """On no device: 4.9 of 5.0 billion weights are in the blocks' linear layers."""
    with torch.device("meta"):
        model = LongLiveTransformer3DModel()
    plain = 2 * sum(parameter.numel() for parameter in model.parameters())
    config = NVFP4Config()
    names = [name for name, module in model.named_modules() if config.converts(name, module)]
    assert len(names) == 300
    for name in names:
        model.set_submodule(name, config.empty_layer(model.get_submodule(name)))
    stored = sum(
        tensor.numel() * (2 if tensor.dtype == torch.float32 and tensor.numel() > 1 else tensor.element_size())
        for tensor in model.state_dict().values()
    )
    assert plain / 2**30 == pytest.approx(9.31, abs=0.01)
    assert 3.3 < plain / stored < 3.56
