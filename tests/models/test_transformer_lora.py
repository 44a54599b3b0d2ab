"""LoRA on the network, by diffusers' own calls: add, save, load, scale, fuse, swap, remove."""

import copy
import json
import pickle
import threading

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.models.lora_scales import lora_scales
from tests.support.checks import logged_by
from tests.support.tiny_pipeline import FORWARDS, every_forward, like, random_inputs, tiny_cache, tiny_transformer


LORA_FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BLOCK_CAUSAL = FORWARDS["block causal"]


@pytest.fixture
def model() -> LongLiveTransformer3DModel:
    return tiny_transformer()


@pytest.fixture
def expected(model) -> torch.Tensor:
    """Without a LoRA."""
    with torch.no_grad():
        return BLOCK_CAUSAL(model)


def lora_config(seed: int = 0, **settings) -> LoraConfig:
    torch.manual_seed(seed)  # of the weights that `add_adapter` draws
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **settings})


def lora_of(model, name: str = "default") -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, adapter_name=name)


@pytest.fixture
def saved(tmp_path):
    """A folder with a LoRA of rank 4 and alpha 8, and what the network computes with it."""
    model = tiny_transformer()
    model.add_adapter(lora_config())
    model.save_lora_adapter(tmp_path)
    with torch.no_grad():
        return tmp_path, BLOCK_CAUSAL(model)


def load(model, folder, **settings):
    model.load_lora_adapter(folder, prefix=None, use_safetensors=True, **settings)


def different(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-4, rtol=1e-4)


# -- adding ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_forward
def test_an_adapter_changes_what_is_computed(model, forward):
    before = forward(model)
    model.add_adapter(lora_config())
    assert different(forward(model), before)
    model.disable_adapters()
    assert torch.equal(forward(model), before)


def test_an_adapter_sits_on_every_linear_of_the_blocks(model):
    model.add_adapter(lora_config(target_modules=[*TARGETS, "net.0.proj", "net.2"]))
    lora = lora_of(model)
    assert len(lora) == 2 * 2 * (4 + 4 + 2)
    assert all(name.startswith("blocks.") for name in lora)


def test_a_second_adapter_of_the_same_name_raises(model):
    model.add_adapter(lora_config())
    with pytest.raises(ValueError, match="default already exists"):
        model.add_adapter(lora_config())


def test_only_the_adapter_is_trained(model):
    model.requires_grad_(False)
    model.add_adapter(lora_config())
    FORWARDS["teacher forcing"](model).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


# -- saving and loading ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("as_dict", [False, True], ids=["folder", "dict"])
def test_a_saved_adapter_computes_the_same(model, saved, as_dict):
    folder, with_lora = saved
    if as_dict:  # has no room for alpha, which is then the rank
        lora = load_file(folder / LORA_FILE)
        model.load_lora_adapter({k: 2 * t if "lora_B" in k else t for k, t in lora.items()}, prefix=None)
    else:
        load(model, folder)
    torch.testing.assert_close(BLOCK_CAUSAL(model), with_lora, atol=1e-5, rtol=1e-5)


def test_the_settings_are_stored_with_the_weights_and_come_back(model, saved):
    folder, _ = saved
    with safe_open(folder / LORA_FILE, "pt") as file:
        stored = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (stored["r"], stored["lora_alpha"], set(stored["target_modules"])) == (4, 8, set(TARGETS))
    load(model, folder, adapter_name="loaded")
    config = model.peft_config["loaded"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 8, set(TARGETS))


def test_keys_may_carry_the_prefix_of_a_pipeline(model, saved):
    folder, _ = saved
    lora = load_file(folder / LORA_FILE)
    model.load_lora_adapter({f"transformer.{name}": tensor for name, tensor in lora.items()}, prefix="transformer")
    assert all(torch.equal(tensor, lora[name]) for name, tensor in lora_of(model, "default_0").items())


def test_a_lora_of_another_model_warns_that_nothing_was_loaded(model, saved):
    folder, _ = saved
    with logged_by("diffusers") as messages:
        model.load_lora_adapter(folder, prefix="unet", use_safetensors=True)
    assert "No LoRA keys associated to LongLiveTransformer3DModel" in messages[-1]
    assert not getattr(model, "peft_config", {})


def test_a_missing_key_warns(model, saved):
    folder, _ = saved
    lora = load_file(folder / LORA_FILE)
    name = "blocks.1.attn2.to_v.lora_A.weight"
    del lora[name]
    with logged_by("diffusers") as messages:
        model.load_lora_adapter(lora, prefix=None)
    assert any("missing keys" in message and name.removesuffix(".weight") in message for message in messages)


def test_an_unexpected_key_warns(model, saved):
    folder, _ = saved
    lora = load_file(folder / LORA_FILE)
    for part, shape in (("A", (4, 24)), ("B", (24, 4))):
        lora[f"blocks.9.attn1.to_q.lora_{part}.weight"] = torch.zeros(shape)
    with logged_by("diffusers") as messages:
        model.load_lora_adapter(lora, prefix=None)
    assert any("unexpected keys" in message and "blocks.9.attn1.to_q.lora_A" in message for message in messages)


@pytest.mark.parametrize("shape", [(4, 23), (5, 24)])
def test_a_lora_of_other_sizes_raises_and_leaves_the_model_as_it_was(model, saved, expected, shape):
    lora = load_file(saved[0] / LORA_FILE)
    lora["blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_lora_adapter(lora, prefix=None)
    assert not model.peft_config
    with torch.no_grad():
        assert torch.equal(BLOCK_CAUSAL(model), expected)


def test_metadata_that_are_no_lora_settings_raise(model, saved):
    folder, _ = saved
    lora = load_file(folder / LORA_FILE)
    save_file(lora, folder / LORA_FILE, metadata={"lora_adapter_metadata": json.dumps({"foo": 1}), "format": "pt"})
    with pytest.raises(TypeError, match="could not be instantiated"):
        load(model, folder)


def test_saving_an_unknown_adapter_raises(model, tmp_path):
    model.add_adapter(lora_config())
    with pytest.raises(ValueError, match="other not found"):
        model.save_lora_adapter(tmp_path, adapter_name="other")


# -- scale, fusing, swapping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "x", None, True, [1.0]], ids=str)
def test_a_scale_that_is_no_number_raises_and_leaves_the_lora_as_it_was(model, scale):
    model.add_adapter(lora_config())
    inputs = random_inputs()
    with torch.no_grad():
        before = model(**inputs).sample
        with pytest.raises(ValueError, match="'scale' of `attention_kwargs` must be a finite number, got"):
            model(**inputs, attention_kwargs={"scale": scale})
        assert torch.equal(model(**inputs).sample, before)


@pytest.mark.parametrize("name", ["lora_scale", "ip_adapter_image_embeds", 7])
def test_attention_arguments_that_nobody_reads_raise(model, name):
    with pytest.raises(ValueError, match=rf"nothing else, got \[{name!r}\]"):
        model(**random_inputs(), attention_kwargs={"scale": 1.0, name: 0.5})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["block causal", "teacher forcing"])
def test_the_scale_of_one_forward(model, kind):
    without = FORWARDS[kind](model)
    model.add_adapter(lora_config())
    full = FORWARDS[kind](model)

    def scaled(scale):
        return FORWARDS[kind](Scaled(model, scale))

    assert torch.equal(scaled(1.0), full)
    assert torch.equal(scaled(0.0), without)
    assert different(scaled(0.5), full) and different(scaled(0.5), without)
    assert torch.equal(FORWARDS[kind](model), full), "a scale lasts for one forward"


@torch.no_grad()
@pytest.mark.parametrize("own", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e308, -1e308, 5e-324, 0.1, -2.0])
def test_whatever_the_scale_of_a_forward_the_lora_keeps_its_own(model, own, scale):
    """Multiplied and divided, it would be lost where the product is 0 or infinite, and rounded elsewhere."""
    model.add_adapter(lora_config())
    model.set_adapters("default", own)
    before, scales = BLOCK_CAUSAL(model), lora_scales(model)
    model(**random_inputs(), attention_kwargs={"scale": scale})
    assert lora_scales(model) == scales and torch.equal(BLOCK_CAUSAL(model), before)


def test_a_forward_that_fails_leaves_the_lora_its_scale(model):
    model.add_adapter(lora_config())
    scales, inputs = lora_scales(model), random_inputs()
    for arguments in ({"timestep": torch.zeros(1, 3)}, {"encoder_hidden_states": torch.zeros(1, 8, 3)}):
        with pytest.raises((ValueError, RuntimeError)):
            model(**{**inputs, **arguments}, attention_kwargs={"scale": 0.0})
        assert lora_scales(model) == scales


@torch.no_grad()
def test_the_scale_may_be_given_by_position(model):
    model.add_adapter(lora_config())
    inputs = random_inputs()
    expected = model(**inputs, attention_kwargs={"scale": 0.25}).sample
    assert torch.equal(model(*inputs.values(), None, None, None, {"scale": 0.25}).sample, expected)
    with pytest.raises(ValueError, match="must be a finite number"):
        model(*inputs.values(), None, None, None, {"scale": float("nan")})


@pytest.mark.parametrize("kind", ["block causal", "teacher forcing"])
def test_a_checkpoint_runs_again_with_the_scale_of_its_forward(model, kind):
    model.add_adapter(lora_config())
    weight = model.blocks[0].attn1.to_q.lora_B["default"].weight

    def gradient() -> torch.Tensor:
        model.zero_grad()
        FORWARDS[kind](Scaled(model, 0.25)).square().sum().backward()
        return weight.grad.clone()

    expected = gradient()
    model.enable_gradient_checkpointing()
    scales = lora_scales(model)
    torch.testing.assert_close(gradient(), expected, atol=0, rtol=1e-6)
    assert lora_scales(model) == scales


@torch.no_grad()
def test_a_forward_beside_one_that_is_scaled_is_not(model):
    """In another thread: layers hold their scales for all. One waits for the other."""
    model.add_adapter(lora_config())
    full, half = model(**random_inputs()).sample, model(**random_inputs(), attention_kwargs={"scale": 0.5}).sample
    is_within, found = threading.Event(), []

    def wait_once(*_) -> None:
        hook.remove()
        is_within.set()
        other.join(0.1)  # which would be long done

    def run_beside() -> None:
        is_within.wait(10)
        with torch.no_grad():
            found.append(model(**random_inputs()).sample)

    other = threading.Thread(target=run_beside)
    hook = model.blocks[0].register_forward_pre_hook(wait_once)
    other.start()
    assert torch.equal(model(**random_inputs(), attention_kwargs={"scale": 0.5}).sample, half)
    other.join(10)
    assert torch.equal(found[0], full)


@torch.no_grad()
def test_a_network_with_a_lora_is_copied_pickled_and_compiled(model):
    model.add_adapter(lora_config())
    inputs = random_inputs()
    expected = model(**inputs, attention_kwargs={"scale": 0.5}).sample
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(**inputs, attention_kwargs={"scale": 0.5}).sample, expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(**inputs, attention_kwargs={"scale": 0.5}).sample
    torch.testing.assert_close(found, expected)
    assert torch.equal(model(**inputs, attention_kwargs={"scale": 0.5}).sample, expected)


class Scaled:
    """`model`, called with `attention_kwargs`."""

    def __init__(self, model, scale: float):
        self.model, self.scale = model, scale
        self.device, self.dtype = model.device, model.dtype

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs, attention_kwargs={"scale": self.scale})


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_the_scale_of_a_stream_reaches_its_text_too(model, scale):
    """Keys and values of the text are kept: they must be those of this scale."""
    model.add_adapter(lora_config())
    inputs = random_inputs(2)
    cache = tiny_cache(model)
    cache.begin_chunk(2)
    model(**inputs, kv_cache=cache, attention_kwargs={"scale": 0.75})
    streamed = model(**inputs, kv_cache=cache, attention_kwargs={"scale": scale}).sample
    whole = model(**inputs, attention_kwargs={"scale": scale}).sample
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@every_forward
def test_fusing_computes_the_same_and_can_be_undone(model, forward):
    without = forward(model)
    model.add_adapter(lora_config())
    expected = forward(model)
    model.fuse_lora()
    torch.testing.assert_close(forward(model), expected, atol=1e-5, rtol=1e-5)
    model.unfuse_lora()
    model.disable_adapters()
    torch.testing.assert_close(forward(model), without, atol=1e-5, rtol=1e-5)


def test_fusing_weights_that_are_not_numbers_raises(model):
    model.add_adapter(lora_config())
    model.blocks[0].attn1.to_q.lora_A["default"].weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN"):
        model.fuse_lora(safe_fusing=True)


@torch.no_grad()
def test_adapters_are_weighted_switched_and_deleted(model, expected):
    model.add_adapter(lora_config(0), "first")
    first = BLOCK_CAUSAL(model)
    model.add_adapter(lora_config(1), "second")
    second = BLOCK_CAUSAL(model)
    assert model.active_adapters() == ["second"]

    model.set_adapters(["first", "second"], [1.0, 0.0])
    torch.testing.assert_close(BLOCK_CAUSAL(model), first, atol=1e-5, rtol=1e-5)
    model.set_adapters(["first", "second"], [0.5, 0.7])
    assert different(BLOCK_CAUSAL(model), first) and different(BLOCK_CAUSAL(model), second)
    model.delete_adapters("first")
    model.set_adapters("second")
    torch.testing.assert_close(BLOCK_CAUSAL(model), second, atol=1e-5, rtol=1e-5)
    assert set(model.peft_config) == {"second"}

    model.unload_lora()
    assert torch.equal(BLOCK_CAUSAL(model), expected)
    assert not any("lora" in name for name in model.state_dict())


def second_lora(tmp_path, **settings):
    model = tiny_transformer()
    model.add_adapter(lora_config(1, **settings))
    model.save_lora_adapter(tmp_path / "second")
    with torch.no_grad():
        return tmp_path / "second", BLOCK_CAUSAL(model)


@torch.no_grad()
def test_an_adapter_is_swapped_in_place(model, saved, tmp_path):
    folder, with_second = second_lora(tmp_path)
    load(model, saved[0], adapter_name="default")
    parameter = model.blocks[0].attn1.to_q.lora_A["default"].weight
    load(model, folder, adapter_name="default", hotswap=True)
    torch.testing.assert_close(BLOCK_CAUSAL(model), with_second, atol=1e-5, rtol=1e-5)
    assert model.blocks[0].attn1.to_q.lora_A["default"].weight is parameter


@torch.no_grad()
def test_an_adapter_of_another_rank_is_swapped_without_compiling_again(model, saved, tmp_path):
    folder, with_second = second_lora(tmp_path, r=2)
    model.enable_lora_hotswap(target_rank=4)
    load(model, saved[0], adapter_name="default")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(**like(model, random_inputs()))
        load(model, folder, adapter_name="default", hotswap=True)
        found = compiled(**like(model, random_inputs())).sample
    torch.testing.assert_close(found, with_second, atol=1e-5, rtol=1e-5)


def test_swapping_for_an_adapter_that_is_not_there_raises(model, saved):
    with pytest.raises(ValueError, match="no existing adapter"):
        load(model, saved[0], adapter_name="default", hotswap=True)


def test_preparing_to_swap_after_loading_raises(model, saved):
    load(model, saved[0])
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        model.enable_lora_hotswap(target_rank=8)


# -- together with other features ------------------------------------------------------------------------------------


@torch.no_grad()
def test_layerwise_casting_leaves_the_adapter_in_full_precision(model):
    model.add_adapter(lora_config())
    expected = BLOCK_CAUSAL(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert {tensor.dtype for tensor in lora_of(model).values()} == {torch.float32}
    assert (BLOCK_CAUSAL(model) - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


@torch.no_grad()
def test_layers_that_are_stored_in_8_bits_take_another_adapter_only_in_place_of_one(model, saved, tmp_path):
    """PEFT would store it in 8 bits, too, in which nothing is multiplied."""
    folder, with_second = second_lora(tmp_path)
    load(model, saved[0], adapter_name="default")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for add in (lambda: load(model, folder), lambda: model.add_adapter(lora_config(1), "second")):
        with pytest.raises(ValueError, match=r"parameters are stored in 8 bits, .*: load it before `enable_layerwise"):
            add()
    assert set(model.peft_config) == {"default"}
    load(model, folder, adapter_name="default", hotswap=True)
    assert (BLOCK_CAUSAL(model) - with_second).square().mean().sqrt() < 0.1 * with_second.square().mean().sqrt()


@torch.no_grad()
def test_group_offload_computes_the_same_with_an_adapter(model, tmp_path):
    model.add_adapter(lora_config())
    expected = BLOCK_CAUSAL(model)
    cpu = torch.device("cpu")
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    assert torch.equal(BLOCK_CAUSAL(model), expected)
