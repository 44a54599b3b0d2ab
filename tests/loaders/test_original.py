import itertools

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.loaders import infer_transformer_config, load_original_transformer, read_original_state_dict


FIVE_B = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "ffn_dim": 14336,
    "num_layers": 30,
    "text_dim": 4096,
    "freq_dim": 256,
    "patch_size": (1, 2, 2),
    "cross_attn_norm": True,
}


@pytest.fixture(scope="module")
def converted(original) -> dict[str, torch.Tensor]:
    return read_original_state_dict(original)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Reading


def test_names_are_those_of_diffusers(original, converted, heads):
    model = WanTransformer3DModel(**infer_transformer_config(converted, **heads))
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert len(converted) == len(original) == 69
    # The pair whose names diffusers swaps, and two others, one by one.
    assert converted["blocks.1.norm2.weight"] is original["blocks.1.norm3.weight"]
    assert converted["blocks.1.attn2.to_out.0.bias"] is original["blocks.1.cross_attn.o.bias"]
    assert converted["scale_shift_table"] is original["head.modulation"]


WRAPPERS = {
    "bare": lambda state: state,
    "generator": lambda state: {"generator": state, "critic": {"other.weight": torch.zeros(1)}, "step": 4},
    "generator_ema": lambda state: {"generator_ema": state, "step": 4},
    "empty generator": lambda state: {"generator": {}, "generator_ema": state},
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"epoch": 1, "state_dict": state},
    "module": lambda state: {"module": state},
    "nested": lambda state: {"generator": {"model": {"state_dict": state}}},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapping_dictionaries(original, converted, wrap):
    assert_equal(read_original_state_dict(wrap(original)), converted)


def test_ema_is_chosen_by_the_argument(original, converted, caplog):
    averaged = {name: tensor + 1 for name, tensor in original.items()}
    both = {"generator": original, "generator_ema": averaged}
    assert_equal(read_original_state_dict(both), converted)
    assert_equal(read_original_state_dict(both, use_ema=True), {name: t + 1 for name, t in converted.items()})
    assert_equal(read_original_state_dict({"generator": original}, use_ema=True), converted)


MARKS = ("model", "module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
PREFIXES = [".".join(order) + "." for length in (1, 2) for order in itertools.permutations(MARKS, length)]


@pytest.mark.parametrize("prefix", [*PREFIXES, "model.diffusion_model.", "model._orig_mod.module.model."])
def test_prefixes_of_wrapping_modules(original, converted, prefix):
    assert_equal(read_original_state_dict({prefix + name: tensor for name, tensor in original.items()}), converted)


@pytest.mark.parametrize("mark", MARKS)
def test_marks_inside_of_names(original, converted, mark):
    marked = {f"model.{name.replace('blocks.1.', f'blocks.1.{mark}.')}": tensor for name, tensor in original.items()}
    assert f"model.blocks.1.{mark}.modulation" in marked
    assert_equal(read_original_state_dict(marked), converted)
    marked = {name.replace(".self_attn.", f".{mark}.self_attn._orig_mod."): t for name, t in original.items()}
    assert_equal(read_original_state_dict(marked), converted)


def test_weights_under_diffusers_names_stay(converted):
    assert_equal(read_original_state_dict(converted), converted)
    assert_equal(read_original_state_dict({f"_orig_mod.{name}": t for name, t in converted.items()}), converted)


def test_the_given_dictionary_is_not_modified(original, heads):
    wrapped = {"generator": {f"model.{name}": tensor for name, tensor in original.items()}, "step": 1}
    names = list(wrapped["generator"])
    load_original_transformer(wrapped, LongLiveTransformer3DModel, **heads)
    assert list(wrapped["generator"]) == names and list(wrapped) == ["generator", "step"]


def test_the_same_parameter_twice(original):
    with pytest.raises(ValueError, match=r"blocks\.0\.modulation twice"):
        read_original_state_dict({**original, "model.blocks.0.modulation": original["blocks.0.modulation"]})


# Building


def test_published_file_equals_the_reference_in_bfloat16(golden, converted, reference_config):
    model = load_original_transformer(
        golden / "model_bf16.pt", LongLiveTransformer3DModel, num_attention_heads=reference_config["num_heads"]
    )
    assert isinstance(model, LongLiveTransformer3DModel)
    assert not model.training
    assert_equal(model.state_dict(), {name: t.bfloat16().float() for name, t in converted.items()})
    config = model.config
    assert (config.in_channels, config.out_channels) == (reference_config["in_dim"], reference_config["out_dim"])
    assert config.num_attention_heads * config.attention_head_dim == reference_config["dim"]
    assert (config.ffn_dim, config.freq_dim) == (reference_config["ffn_dim"], reference_config["freq_dim"])
    assert (config.text_dim, config.num_layers) == (reference_config["text_dim"], reference_config["num_layers"])


@pytest.mark.parametrize("model_class", [LongLiveTransformer3DModel, WanTransformer3DModel])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_dtypes_equal_from_pretrained(tmp_path, original, heads, model_class, dtype):
    loaded = load_original_transformer(original, model_class, torch_dtype=dtype, **heads)
    loaded.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path, dtype=dtype)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in again.named_parameters()}
    assert_equal(again.state_dict(), loaded.state_dict())
    half = dtype in (torch.bfloat16, torch.float16)
    assert {p.dtype for p in loaded.parameters()} == ({dtype, torch.float32} if half else {torch.float32})
    assert loaded.scale_shift_table.dtype == loaded.blocks[1].norm2.weight.dtype == torch.float32


@pytest.mark.parametrize("model_class", [LongLiveTransformer3DModel, WanTransformer3DModel])
def test_nothing_stays_on_meta(original, heads, model_class):
    model = load_original_transformer(original, model_class, device="cpu", **heads)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_from_original_runs_like_the_model_it_came_from(tmp_path, original, heads):
    save_file(original, tmp_path / "model.safetensors")
    model = LongLiveTransformer3DModel.from_original(tmp_path / "model.safetensors", chunk_size=2, **heads)
    assert model.config.chunk_size == 2
    torch.manual_seed(0)
    latents, text = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 16, 32)
    with torch.no_grad():
        found = model(latents, torch.full((1, 2), 500.0), text, return_dict=False)[0]
        # One chunk, all frames at one time: exactly what Wan's own network computes.
        wan = load_original_transformer(original, WanTransformer3DModel, **heads)
        expected = wan(latents, torch.tensor([500.0]), text, return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_model_owns_its_memory(tmp_path, original, heads):
    model = load_original_transformer(original, LongLiveTransformer3DModel, **heads)
    with torch.no_grad():
        model.proj_out.bias.add_(1)
    assert torch.equal(model.proj_out.bias, original["head.head.bias"] + 1)

    path = tmp_path / "model.pt"
    torch.save(original, path)
    model = load_original_transformer(path, LongLiveTransformer3DModel, **heads)
    path.write_bytes(b"")  # would be a bus error if the weights were still mapped
    assert torch.equal(model.proj_out.bias, original["head.head.bias"])


def test_transposed_weights_can_be_saved(tmp_path, original, heads):
    name = "blocks.0.ffn.0.weight"
    state = {**original, name: original[name].T.contiguous().T}
    load_original_transformer(state, LongLiveTransformer3DModel, **heads).save_pretrained(tmp_path)
    assert_equal(LongLiveTransformer3DModel.from_pretrained(tmp_path).state_dict(), read_original_state_dict(original))


# Sizes


def test_5b_shapes_on_meta():
    with torch.device("meta"):
        wan = WanTransformer3DModel(**FIVE_B)
    state = dict(wan.state_dict())
    config = infer_transformer_config(state)
    assert config == FIVE_B
    with torch.device("meta"):
        model = LongLiveTransformer3DModel(**config)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in wan.parameters()) == 4_999_787_712


def test_heads(converted):
    assert infer_transformer_config(converted)["num_attention_heads"] == 1  # 128 wide: one head of the usual size
    assert infer_transformer_config(converted, attention_head_dim=32)["num_attention_heads"] == 4
    assert infer_transformer_config(converted, num_attention_heads=4)["attention_head_dim"] == 32
    for wrong in ({"attention_head_dim": 48}, {"num_attention_heads": 3}, {"num_attention_heads": 0}):
        with pytest.raises(ValueError, match=r"128 wide, which is not \d+ heads of \d+ channels"):
            infer_transformer_config(converted, **wrong)
    with pytest.raises(ValueError, match=r"not 4 heads of 64 channels \(256\)"):
        infer_transformer_config(converted, num_attention_heads=4, attention_head_dim=64)


@pytest.mark.parametrize(
    ("name", "value"),
    [("in_channels", 48), ("ffn_dim", 512), ("num_layers", 30), ("text_dim", 4096), ("patch_size", [1, 1, 1])],
)
def test_contradicting_config(original, converted, name, value):
    shown = infer_transformer_config(converted)[name]
    with pytest.raises(ValueError) as error:
        load_original_transformer(original, LongLiveTransformer3DModel, **{name: value})
    assert f"{name}={shown}" in str(error.value)
    assert f"{name}={tuple(value) if name == 'patch_size' else value}" in str(error.value)


def test_agreeing_config_and_settings(original, heads):
    model = load_original_transformer(
        original, LongLiveTransformer3DModel, in_channels=8, patch_size=[1, 2, 2], eps=1e-5, chunk_size=4, **heads
    )
    assert (model.config.eps, model.config.chunk_size) == (1e-5, 4)


def test_unknown_setting(original):
    with pytest.raises(ValueError, match=r"no setting chunksize; it has .*chunk_size"):
        load_original_transformer(original, LongLiveTransformer3DModel, chunksize=4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_unusable_dtype(original, dtype):
    with pytest.raises(ValueError, match="torch_dtype"):
        load_original_transformer(original, LongLiveTransformer3DModel, torch_dtype=dtype)
    with pytest.raises(ValueError, match=rf"head\.head\.weight is {dtype}"):
        load_original_transformer(
            {**original, "head.head.weight": original["head.head.weight"].to(dtype)}, LongLiveTransformer3DModel
        )


# Refusals


def test_missing_unexpected_and_misshapen_are_one_error(original, heads):
    state = dict(original)
    for part in "qkvo":
        del state[f"blocks.1.self_attn.{part}.weight"], state[f"blocks.1.self_attn.{part}.bias"]
    state["extra.weight"] = torch.zeros(3)
    state["blocks.0.ffn.2.weight"] = torch.zeros(128, 255)
    with pytest.raises(ValueError) as error:
        load_original_transformer(state, LongLiveTransformer3DModel, **heads)
    message = str(error.value)
    assert "62 tensors are not the 69" in message
    assert "8 missing: blocks.1.attn1.to_q.weight" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of a wrong shape: blocks.0.ffn.net.2.weight (128, 255) instead of (128, 256)" in message


def test_a_lost_block(original, heads):
    state = {name: tensor for name, tensor in original.items() if not name.startswith("blocks.0.")}
    with pytest.raises(ValueError, match=r"no blocks\.0\.ffn"):
        load_original_transformer(state, LongLiveTransformer3DModel, **heads)


def test_refused_before_any_weight_is_touched():
    with torch.device("meta"):
        state = dict(WanTransformer3DModel(**FIVE_B).state_dict())  # has no data: copying would raise another error
    del state["blocks.29.scale_shift_table"]
    with pytest.raises(ValueError, match=r"824 tensors are not the 825.* 1 missing: blocks\.29\.scale_shift_table"):
        load_original_transformer(state, LongLiveTransformer3DModel)


def test_legacy_packed_format(original):
    with pytest.raises(ValueError, match=r"legacy NVFP4 format.*model_4o6\.pt"):
        load_original_transformer(
            {"generator": original, "checkpoint_format": "longlive_generator_te_nvfp4"}, LongLiveTransformer3DModel
        )


def tensors(*names):
    return {name: torch.zeros(2) for name in names}


FOREIGN = {
    "lora file": ({"generator_lora": tensors("base_model.model.blocks.0.ffn.0.lora_A.weight")}, "It is a LoRA"),
    "bare lora": (tensors("diffusion_model.blocks.0.ffn.0.lora_A.weight"), "is a LoRA"),
    "musubi lora": (tensors("lora_unet_blocks_0_ffn_0.lora_down.weight"), "is a LoRA"),
    "wan vae": (tensors("encoder.conv1.weight", "decoder.conv1.weight", "conv1.weight"), r"is a VAE \(3 tensors\)"),
    "diffusers vae": (tensors("encoder.conv_in.weight", "post_quant_conv.weight"), "is a VAE"),
    "umt5": (tensors("token_embedding.weight", "blocks.0.attn.q.weight"), "is a text encoder"),
    "transformers umt5": (tensors("shared.weight", "encoder.block.0.layer.0.layer_norm.weight"), "is a text encoder"),
    "flux": (tensors("double_blocks.0.img_attn.qkv.weight", "img_in.weight"), "no patch_embedding.weight among its 2"),
    "critic only": ({"critic": tensors("patch_embedding.weight"), "step": 3}, "keys are: critic, step"),
    "empty": ({}, "keys are: none"),
    "nothing but numbers": ({"generator": {"step": 1}}, "holds no weights of a generator"),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN)
def test_checkpoints_of_other_models(tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        load_original_transformer(path, LongLiveTransformer3DModel)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["blocks.0.cross_attn.k_img.weight", "img_emb.proj.0.weight"])
def test_image_to_video_model(original, name):
    with pytest.raises(ValueError, match="image-to-video"):
        load_original_transformer({**original, name: torch.zeros(4)}, LongLiveTransformer3DModel)


def test_vae_and_lora_files_of_this_project(tmp_path, golden, wan_base):
    with pytest.raises(ValueError, match="is a VAE"):
        load_original_transformer(wan_base / "vae" / "diffusion_pytorch_model.safetensors", LongLiveTransformer3DModel)
    with pytest.raises(ValueError, match="It is a LoRA"):
        load_original_transformer(golden / "lora.pt", LongLiveTransformer3DModel)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.2, 0.5, 0.9, 0.9999])
def test_truncated_checkpoint(tmp_path, golden, part):
    whole = (golden / "model_bf16.pt").read_bytes()
    path = tmp_path / "model.pt"
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"model\.pt \(\d+ bytes\)"):
        load_original_transformer(path, LongLiveTransformer3DModel)
