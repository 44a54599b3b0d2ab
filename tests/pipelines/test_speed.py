"""`pipe.optimize`: what it changes, on which device, and that nothing else is lost."""

import pytest
import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import AttentionBackendName
from peft import LoraConfig
from torch import nn

from longlive_diffusers import LongLivePipeline, NVFP4Config
from longlive_diffusers.fused.feed_forward import FusedGELU
from longlive_diffusers.fused.onednn import has_onednn
from longlive_diffusers.fused.packed_linear import PackedLinear
from longlive_diffusers.nvfp4.fp8_linear import FP8Linear
from longlive_diffusers.nvfp4.linear import nvfp4_layers
from longlive_diffusers.nvfp4.quantizer import quantize_model
from longlive_diffusers.pipelines.speed import SPEEDS, optimize
from tests.support.attention_kernels import ask_for_kernel
from tests.support.nvfp4_models import small_pipeline
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not has_onednn(torch.bfloat16), reason="needs a CPU with instructions for bfloat16")


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


def video(pipe, **options) -> torch.Tensor:
    return pipe(**tiny_arguments(**options)).frames


def test_the_exact_video_is_the_same_to_within_rounding():
    expected, pipe = video(tiny_pipeline()), tiny_pipeline()
    names = set(pipe.transformer.state_dict())
    plan = pipe.optimize()
    assert plan.speed == "exact" and plan.device == CPU and plan.arguments == {}
    assert FusedGELU in kinds(pipe.transformer) and GELU not in kinds(pipe.transformer)
    assert set(pipe.transformer.state_dict()) == names and nn.Linear not in kinds(pipe.transformer.blocks)
    assert (video(pipe) - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_it_may_be_called_again():
    pipe = tiny_pipeline()
    first, again = pipe.optimize(), pipe.optimize()
    assert len(first.choices) == 2 and again.choices == () and "there is nothing to change" in str(again)


def test_bad_speeds_are_refused_before_anything_is_changed():
    pipe = tiny_pipeline()
    for wrong in ("faster", None, 2, ["fast"]):
        with pytest.raises(ValueError, match="A speed is 'exact', 'fast', 'fastest', got "):
            pipe.optimize(wrong)
    with pytest.raises(ValueError, match="no transformer"):
        tiny_pipeline(transformer=None).optimize()
    assert GELU in kinds(pipe.transformer)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_lora_beside_the_weights_counts_or_is_refused(speed):
    pipe = tiny_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "net.0.proj"], init_lora_weights=False))
    if speed == "exact":
        expected = video(pipe)
        pipe.optimize(speed)
        assert (video(pipe) - expected).abs().max() <= 5e-6 * expected.abs().max()
        return
    with pytest.raises(ValueError, match="LoRA beside them: fuse it before"):
        pipe.optimize(speed)
    assert GELU in kinds(pipe.transformer)


@needs_bf16
@pytest.mark.parametrize("speed", ["fast", "fastest"])
def test_on_a_cpu_fewer_bits_are_bfloat16(speed):
    expected, pipe = video(tiny_pipeline()), tiny_pipeline()
    plan = pipe.optimize(speed)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    kept = {name.split(".")[-1] for name, own in pipe.transformer.named_parameters() if own.dtype == torch.float32}
    assert "scale_shift_table" in kept and pipe.transformer.blocks[0].norm2.weight.dtype == torch.float32
    error = (video(pipe) - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    assert any("bfloat16" in choice for choice in plan.choices) and str(plan).count("\n") == len(plan.choices)
    assert (speed == "fastest") == bool(plan.arguments)
    assert video(pipe, **plan.arguments).isfinite().all()


@pytest.fixture
def hopper(monkeypatch) -> torch.device:
    """What is chosen for a Hopper, and then runs here: products in FP8 give the same numbers on a CPU."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (9, 0))
    return torch.device("cuda")


def test_on_a_hopper_fewer_bits_are_fp8(hopper):
    pipe = small_pipeline()
    expected = video(pipe)
    plan = optimize(pipe.transformer, pipe.vae, "fast", hopper)
    blocks, rest = pipe.transformer.blocks, pipe.transformer.condition_embedder
    assert nn.Linear not in kinds(blocks) and FP8Linear in kinds(blocks) and FP8Linear not in kinds(rest)
    assert any("FP8" in choice for choice in plan.choices)
    error = (video(pipe) - expected).norm() / expected.norm()
    assert 0 < error < 0.2


def test_a_card_before_ada_has_no_fp8(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (8, 0))
    pipe = small_pipeline()
    plan = optimize(pipe.transformer, pipe.vae, "fast", torch.device("cuda"))
    assert FP8Linear not in kinds(pipe.transformer)
    assert any("needs a GPU of compute capability 8.9" in choice and "8.0" in choice for choice in plan.choices)


def test_weights_in_nvfp4_are_multiplied_in_fp8_on_a_hopper(hopper):
    pipe = small_pipeline()
    quantize_model(pipe.transformer, NVFP4Config())
    optimize(pipe.transformer, pipe.vae, "fast", hopper)
    layers = nvfp4_layers(pipe.transformer).values()
    assert layers and {layer.requested_backend for layer in layers} == {"fp8"}
    assert video(pipe).isfinite().all()


def test_what_is_in_fp8_cannot_be_saved(hopper, tmp_path):
    pipe = small_pipeline()
    optimize(pipe.transformer, pipe.vae, "fast", hopper)
    with pytest.raises(ValueError, match=r"FP8 .* cannot be saved"):
        pipe.save_pretrained(tmp_path / "pipeline")
    assert not list((tmp_path / "pipeline").rglob("*.safetensors"))


def test_an_optimized_pipeline_is_saved_as_what_it_was(tmp_path):
    pipe = tiny_pipeline()
    weights = {name: own.clone() for name, own in pipe.transformer.state_dict().items()}
    pipe.optimize()
    pipe.save_pretrained(tmp_path)
    loaded = LongLivePipeline.from_pretrained(tmp_path).transformer.state_dict()
    assert weights.keys() == loaded.keys() and all(torch.equal(own, loaded[name]) for name, own in weights.items())


def test_a_lora_after_it_is_refused(tmp_path):
    pipe = tiny_pipeline()
    pipe.optimize()
    with pytest.raises(ValueError, match=r"The transformer was optimized: \d+ layers, .* call `optimize` last"):
        pipe.load_lora_weights({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 16)})


def compile_whole(pipe) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compile_in_place(pipe) -> None:
    pipe.transformer.compile(backend="eager")


def compile_forward(pipe) -> None:
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend="eager")


def compile_repeated(pipe) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def compile_a_block(pipe) -> None:
    pipe.transformer.blocks[1] = torch.compile(pipe.transformer.blocks[1], backend="eager")


def compile_a_block_in_place(pipe) -> None:
    pipe.transformer.blocks[1].compile(backend="eager")


def compile_a_part(pipe) -> None:
    pipe.transformer.blocks[1].ffn = torch.compile(pipe.transformer.blocks[1].ffn, backend="eager")


WAYS_TO_COMPILE = (
    compile_whole,
    compile_in_place,
    compile_forward,
    compile_repeated,
    compile_a_block,
    compile_a_block_in_place,
    compile_a_part,
)


@pytest.mark.parametrize("compile_it", WAYS_TO_COMPILE)
def test_what_is_compiled_is_not_packed(compile_it):
    pipe = tiny_pipeline()
    expected = video(pipe)
    compile_it(pipe)
    plan = pipe.optimize()
    assert PackedLinear not in kinds(pipe.transformer) and len(plan.choices) == 1
    torch.testing.assert_close(video(pipe), expected)


@pytest.mark.parametrize("compile_it", WAYS_TO_COMPILE)
def test_what_is_packed_is_not_compiled(compile_it):
    """By one line, at the latest before a video is begun; the compiler's own error has thousands."""
    pipe = tiny_pipeline()
    pipe.optimize()
    with pytest.raises(ValueError, match=r"\d+ layers, for instance .* cannot be compiled\..* call `optimize` last"):
        compile_it(pipe)
        video(pipe)


def test_what_else_is_compiled_does_not_matter():
    pipe = tiny_pipeline()
    expected = video(pipe)
    pipe.optimize()
    pipe.transformer.blocks[0].norm2.compile(backend="eager")
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    assert (video(pipe) - expected).abs().max() <= 5e-6 * expected.abs().max()


@needs_bf16
@pytest.mark.parametrize("compile_it", [compile_whole, compile_a_block])
def test_what_is_compiled_is_bfloat16_at_a_faster_speed(compile_it):
    pipe = tiny_pipeline()
    compile_it(pipe)
    plan = pipe.optimize("fast")
    assert "bfloat16" in plan.choices[0] and pipe.transformer.dtype == torch.bfloat16
    assert video(pipe).isfinite().all()


@needs_bf16
def test_speeds_may_be_tried_in_turn():
    """A faster one after a slower one is the faster one, and what is there already is not told again."""
    pipe, whole = tiny_pipeline(), tiny_pipeline()
    pipe.optimize("exact")
    pipe.optimize("fast")
    whole.optimize("fast")
    assert torch.equal(video(pipe), video(whole))
    assert pipe.optimize("fastest").choices == whole.optimize("fastest").choices


def quantized(pipe) -> None:
    quantize_model(pipe.transformer, NVFP4Config())


def compiled(pipe) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True)


def fused(pipe) -> None:
    pipe.transformer.fuse_qkv_projections()


@pytest.mark.parametrize("change", [quantized, compiled, fused])
def test_what_is_to_come_before_it_is_refused_after_it(change):
    pipe = small_pipeline()
    expected = video(pipe)
    pipe.optimize()
    with pytest.raises(ValueError, match=r"The transformer was optimized: \d+ layers, .* call `optimize` last"):
        change(pipe)
    assert (video(pipe) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_fused_projections_are_optimized_and_not_split_again():
    pipe = small_pipeline()
    expected = video(pipe)
    pipe.transformer.fuse_qkv_projections()
    pipe.optimize()
    assert (video(pipe) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match=r"changed since, into PackedLinear"):
        pipe.transformer.unfuse_qkv_projections()


@needs_bf16
def test_layers_that_are_cast_one_by_one_stay_as_they_are():
    pipe = tiny_pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    expected = video(pipe)
    plan = pipe.optimize("fast")
    assert plan.choices == (
        "The networks stay in their dtype: layers are offloaded or cast one by one, or have hooks.",
    )
    assert torch.equal(video(pipe), expected)


@torch.no_grad()
def test_of_a_layer_with_a_lora_the_layer_is_packed_and_the_lora_is_not():
    pipe = tiny_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "net.0.proj"], init_lora_weights=False))
    without_lora = video(tiny_pipeline())
    pipe.optimize("exact")
    for layer in (pipe.transformer.blocks[0].attn1.to_q, pipe.transformer.blocks[1].ffn.net[0].proj):
        assert type(layer.base_layer) is PackedLinear
        assert type(layer.lora_A["default"]) is type(layer.lora_B["default"]) is nn.Linear
    assert type(pipe.transformer.blocks[0].attn1.to_k) is PackedLinear
    with pytest.raises(ValueError, match="cannot have a LoRA fused into them"):  # PEFT adds to a copy of the weight
        pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    assert (video(pipe) - without_lora).abs().max() <= 5e-6 * without_lora.abs().max()


@torch.no_grad()
def test_a_lora_that_was_fused_before_can_be_taken_out():
    pipe = tiny_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.fuse_lora(components=["transformer"])
    fused = video(pipe)
    pipe.optimize("exact")
    assert (video(pipe) - fused).abs().max() <= 5e-6 * fused.abs().max()
    pipe.unfuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    expected = video(tiny_pipeline())
    assert (video(pipe) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("speed", ["fast", "fastest"])
def test_attention_is_in_fp8_where_cudnn_can(hopper, monkeypatch, speed):
    monkeypatch.setattr("longlive_diffusers.pipelines.speed.has_cudnn_fp8", lambda device, head_dim: True)
    pipe = small_pipeline()
    expected = video(pipe)
    plan = optimize(pipe.transformer, pipe.vae, speed, hopper)
    assert plan.arguments == {"kv_cache_dtype": "fp8_attention"} and "attention in FP8" in str(plan)
    assert 0 < (video(pipe, **plan.arguments) - expected).norm() / expected.norm() < 0.2
    assert "kv_cache_dtype" not in optimize(pipe.transformer, pipe.vae, "exact", hopper).arguments


def test_a_kernel_that_was_asked_for_stays(hopper, monkeypatch):
    monkeypatch.setattr("longlive_diffusers.pipelines.speed.has_cudnn_fp8", lambda device, head_dim: True)
    monkeypatch.setattr("longlive_diffusers.pipelines.speed.cudnn_unsupported_reason", lambda device, head_dim: None)
    pipe = small_pipeline()
    ask_for_kernel(pipe.transformer, AttentionBackendName._NATIVE_MATH)
    plan = optimize(pipe.transformer, pipe.vae, "fast", hopper)
    assert plan.arguments == {} and "its backend is '_native_math'" in str(plan)


def test_the_package_that_is_missing_is_named(hopper, monkeypatch):
    monkeypatch.setattr("longlive_diffusers.models.cudnn_attention._load_cudnn", lambda: None)
    pipe = small_pipeline()
    plan = optimize(pipe.transformer, pipe.vae, "fast", hopper)
    assert plan.arguments == {} and "longlive-diffusers[fp8-attention]" in str(plan)
