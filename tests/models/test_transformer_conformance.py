"""LongLiveTransformer3DModel behaves as every model of diffusers does: saving, loading, dtypes, outputs.

diffusers tests its models with mixins that it does not ship; the test_transformer_*.py files beside this one state the
same behaviors for ours. Of the behaviors that those mixins know, these are not here, because:

    from_single_file            reads only classes that diffusers lists in its own table. Ours has `from_original` for
                                the published files; tests/loaders covers it (config, dtype, parameters).
    context parallelism         diffusers shards a sequence by a `_cp_plan`, which would cut chunks and the KV cache in
                                pieces. There is none: `enable_parallelism` shards by frames and heads, which
                                tests/parallel covers.
    bitsandbytes, GGUF, torchao need packages that are no dependency, or a GPU. NVFP4, our own kind, has tests/nvfp4.
    IP adapters                 Wan has none for text-to-video, and neither have we.
    xformers, NPU, XLA          need their packages and hardware; attention goes through diffusers' dispatcher, and
                                test_transformer_attention.py tests that it does.
    keep_in_fp32 as str or list is the loader's own reading of a class attribute; ours is a list.
    model_parallelism           needs several GPUs; splitting over CPU and disk, by the same device map, is in
                                test_transformer_memory.py.
"""

import json

import pytest
import torch
from diffusers import AutoModel, WanTransformer3DModel
from diffusers.models import modeling_utils
from safetensors.torch import load_file

from longlive_diffusers import LongLiveTransformer3DModel
from tests.support.checks import logged_by
from tests.support.tiny_pipeline import (
    CONFIG,
    FORWARDS,
    SIDE,
    WAN_CONFIG,
    every_forward,
    like,
    random_inputs,
    stream_chunks,
    tiny_cache,
    tiny_transformer,
    tiny_wan_transformer,
)


WAN_5B = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 14336,
    "num_layers": 30,
}
BLOCK_CAUSAL = FORWARDS["block causal"]


@pytest.fixture
def model() -> LongLiveTransformer3DModel:
    return tiny_transformer()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def assert_same_weights(model, other):
    expected, found = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -- saving and loading ----------------------------------------------------------------------------------------------


@torch.no_grad()
@every_forward
def test_a_saved_model_computes_the_same(model, saved, forward):
    assert torch.equal(forward(LongLiveTransformer3DModel.from_pretrained(saved)), forward(model))


def test_the_config_survives(model, saved):
    loaded = LongLiveTransformer3DModel.from_pretrained(saved)
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    found = {name: loaded.config[name] for name in settings}
    assert {**found, "patch_size": tuple(found["patch_size"])} == settings  # JSON has no tuples
    assert {name: found[name] for name in CONFIG} == CONFIG
    assert json.loads((saved / "config.json").read_text())["_class_name"] == "LongLiveTransformer3DModel"


def test_auto_model_finds_the_class(model, saved):
    loaded = AutoModel.from_pretrained(str(saved))
    assert isinstance(loaded, LongLiveTransformer3DModel)
    assert_same_weights(model, loaded)


def test_a_variant_is_saved_and_asked_for_by_name(model, tmp_path):
    model.save_pretrained(tmp_path, variant="bf16")
    assert (tmp_path / "diffusion_pytorch_model.bf16.safetensors").exists()
    assert_same_weights(model, LongLiveTransformer3DModel.from_pretrained(tmp_path, variant="bf16"))
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        LongLiveTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_a_sharded_checkpoint_loads(model, tmp_path, variant):
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert len(list(tmp_path.glob("*.index*.json"))) == 1
    assert_same_weights(model, LongLiveTransformer3DModel.from_pretrained(tmp_path, variant=variant))


def test_shards_load_in_parallel(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    assert_same_weights(model, LongLiveTransformer3DModel.from_pretrained(tmp_path))


def test_a_loaded_model_is_in_evaluation_mode(saved):
    assert not LongLiveTransformer3DModel.from_pretrained(saved).training


def test_nothing_but_parameters_is_stored(model, saved):
    stored = load_file(saved / "diffusion_pytorch_model.safetensors")
    assert set(stored) == {name for name, _ in model.named_parameters()}


# -- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_loads_in_a_dtype_and_keeps_what_must_be_float32(saved, dtype, argument):
    loaded = LongLiveTransformer3DModel.from_pretrained(saved, **{argument: dtype})
    assert loaded.dtype == dtype
    for name, parameter in loaded.named_parameters():
        is_kept = any(part in name.split(".") for part in LongLiveTransformer3DModel._keep_in_fp32_modules)
        assert parameter.dtype == (torch.float32 if is_kept else dtype), name


def test_keeps_in_float32_what_wan_keeps(tmp_path, saved):
    tiny_wan_transformer().save_pretrained(tmp_path / "wan")
    dtypes = [
        {
            name: parameter.dtype
            for name, parameter in cls.from_pretrained(folder, dtype=torch.bfloat16).named_parameters()
        }
        for cls, folder in ((LongLiveTransformer3DModel, saved), (WanTransformer3DModel, tmp_path / "wan"))
    ]
    assert dtypes[0] == dtypes[1]


@torch.no_grad()
@every_forward
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)], ids=str)
def test_computes_in_a_half_dtype(model, saved, forward, dtype, tolerance):
    output = forward(LongLiveTransformer3DModel.from_pretrained(saved, dtype=dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), forward(model), atol=tolerance, rtol=tolerance)


@torch.no_grad()
@every_forward
def test_weights_cast_before_saving_compute_the_same(model, tmp_path, forward):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = LongLiveTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(forward(loaded), forward(model), atol=0.06, rtol=0.06)


def test_casting_with_to_warns_about_float32_modules(model):
    with logged_by("diffusers") as messages:
        model.to(torch.bfloat16)
    assert len(messages) == 1
    assert "should be kept in float32" in messages[0] and "scale_shift_table" in messages[0]


# -- outputs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_forward
def test_is_deterministic(model, forward):
    assert torch.equal(forward(model), forward(model))


@torch.no_grad()
@pytest.mark.parametrize(("frames", "batch"), [(2, 1), (6, 1), (4, 3)])
def test_the_output_has_the_shape_of_the_latents(model, frames, batch):
    inputs = random_inputs(frames, batch)
    assert model(**inputs).sample.shape == inputs["hidden_states"].shape


@torch.no_grad()
def test_input_and_output_channels_may_differ():
    model = tiny_transformer(out_channels=5)
    assert model(**random_inputs()).sample.shape[1] == 5


@torch.no_grad()
def test_dict_and_tuple_hold_the_same(model):
    result = model(**random_inputs(), return_dict=False)
    assert isinstance(result, tuple) and len(result) == 1
    assert torch.equal(result[0], model(**random_inputs(), return_dict=True).sample)
    assert torch.equal(result[0], model(**random_inputs())["sample"])


@torch.no_grad()
def test_a_forward_leaves_nothing_on_the_model(model):
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    before = BLOCK_CAUSAL(model)
    stream_chunks(model)
    FORWARDS["teacher forcing"](model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules
    assert torch.equal(BLOCK_CAUSAL(model), before)


def test_config_values_can_be_read_from_the_model_with_a_warning(model):
    with pytest.warns(FutureWarning, match="in_channels"):
        assert model.in_channels == CONFIG["in_channels"]


def test_unknown_attributes_raise(model):
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_counts_its_parameters(model):
    assert model.num_parameters() == sum(tensor.numel() for tensor in model.state_dict().values())
    assert model.get_memory_footprint() == 4 * model.num_parameters()


# -- Wan's models are ours -------------------------------------------------------------------------------------------


def test_has_the_parameters_of_wan(model):
    assert shapes_of(model) == shapes_of(tiny_wan_transformer())


def test_the_default_is_the_5b_model_to_the_last_parameter():
    with torch.device("meta"):
        ours, wan = LongLiveTransformer3DModel(), WanTransformer3DModel(**WAN_5B)
    assert {name: ours.config[name] for name in WAN_5B} == WAN_5B
    assert shapes_of(ours) == shapes_of(wan)
    assert ours.num_parameters() == wan.num_parameters() == 4_999_787_712


def test_loads_a_folder_of_wan(tmp_path):
    wan = tiny_wan_transformer()
    wan.save_pretrained(tmp_path)
    model = LongLiveTransformer3DModel.from_pretrained(tmp_path)
    assert_same_weights(wan, model)
    assert {name: model.config[name] for name in WAN_CONFIG} == WAN_CONFIG
    assert model.config.chunk_size == 8


def test_settings_of_our_own_can_be_given_when_wan_is_loaded(tmp_path):
    tiny_wan_transformer().save_pretrained(tmp_path)
    model = LongLiveTransformer3DModel.from_pretrained(tmp_path, chunk_size=2, sample_height=4)
    assert (model.config.chunk_size, model.config.sample_height) == (2, 4)


def test_wan_loads_a_folder_of_ours(model, saved):
    assert_same_weights(model, WanTransformer3DModel.from_pretrained(saved))


@torch.no_grad()
def test_one_chunk_at_one_time_is_what_wan_computes(model):
    inputs = random_inputs(frames=2)
    inputs["timestep"] = torch.tensor([700.0])
    wan = tiny_wan_transformer()
    wan.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(**inputs).sample, wan(**inputs).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_streaming_clean_latents_is_one_block_causal_forward(model):
    inputs = random_inputs(frames=8)
    cache = tiny_cache(model, window_size=8, sink_size=2)
    assert (cache.grid_height, cache.grid_width) == (SIDE // 2, SIDE // 2)
    expected = model(**like(model, inputs)).sample
    torch.testing.assert_close(stream_chunks(model, cache=cache), expected, atol=1e-5, rtol=1e-5)
