"""LoRA on the pipeline, by diffusers' own calls, with files of diffusers and of LongLive."""

import json
import shutil

import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.loaders import read_original_lora
from tests.support.golden_models import TEXT_LENGTH as GOLDEN_TEXT_LENGTH
from tests.support.golden_models import golden_pipeline, golden_transformer, load_rollout
from tests.support.paths import GOLDEN
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline, tiny_transformer


LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


def run(pipe, **overrides) -> torch.Tensor:
    return pipe(**tiny_arguments(**overrides)).frames


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def save_lora(folder, seed: int, rank: int = 4, alpha: int = 8) -> str:
    """What a training script leaves: weights and, beside them, the settings."""
    transformer = tiny_transformer()
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    LongLivePipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    return str(folder)


@pytest.fixture
def lora(tmp_path) -> str:
    return save_lora(tmp_path / "first", seed=1)


@pytest.fixture
def second_lora(tmp_path) -> str:
    return save_lora(tmp_path / "second", seed=2)


# -- loading and saving ----------------------------------------------------------------------------------------------


def test_a_saved_lora_has_diffusers_layout_and_its_settings(lora):
    with safe_open(f"{lora}/{LORA_FILE}", "pt") as file:
        assert len(file.keys()) == 2 * 2 * 10
        assert all(key.startswith("transformer.blocks.") for key in file.keys())  # noqa: SIM118
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 8)


def test_a_loaded_lora_changes_the_video_and_unloading_restores_it(pipe, lora):
    before = run(pipe)
    pipe.load_lora_weights(lora)
    assert not close(run(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), before)
    assert not any("lora" in name for name in pipe.transformer.state_dict())


def test_a_loaded_lora_keeps_its_alpha(pipe, lora):
    pipe.load_lora_weights(lora, adapter_name="mine")
    config = pipe.transformer.peft_config["mine"]
    assert (config.r, config.lora_alpha) == (4, 8)
    assert pipe.transformer.blocks[0].attn1.to_q.scaling["mine"] == 2.0


def test_a_lora_is_loaded_from_a_file_by_name(pipe, lora):
    pipe.load_lora_weights(lora)
    expected = run(pipe)
    other = tiny_pipeline()
    other.load_lora_weights(lora, weight_name=LORA_FILE)
    assert torch.equal(run(other), expected)


def test_a_trained_lora_survives_saving_and_loading(pipe, lora, tmp_path):
    pipe.load_lora_weights(lora, adapter_name="mine")
    expected = run(pipe)
    LongLivePipeline.save_lora_weights(
        tmp_path / "again",
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer, adapter_name="mine"),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["mine"].to_dict(),
    )
    other = tiny_pipeline()
    other.load_lora_weights(str(tmp_path / "again"))
    assert close(run(other), expected)


def test_saving_nothing_raises(tmp_path):
    with pytest.raises(ValueError, match="transformer_lora_layers"):
        LongLivePipeline.save_lora_weights(tmp_path)


def test_a_lora_of_a_text_encoder_alone_is_refused(pipe):
    strange = {f"text_encoder.q.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}
    with pytest.raises(ValueError, match=r"Nothing of this LoRA is for the transformer: none of its 2 keys"):
        pipe.load_lora_weights(strange)


def test_weights_that_are_no_lora_raise(pipe):
    with pytest.raises(ValueError, match="is not a LoRA: none of its 1 tensors"):
        pipe.load_lora_weights({"transformer.blocks.0.attn1.to_q.weight": torch.zeros(4, 4)})


# -- scale and fusing ------------------------------------------------------------------------------------------------


def test_the_scale_of_one_call(pipe, lora):
    before = run(pipe)
    pipe.load_lora_weights(lora)
    full = run(pipe)
    assert torch.equal(run(pipe, attention_kwargs={"scale": 1.0}), full)
    assert close(run(pipe, attention_kwargs={"scale": 0.0}), before)
    half = run(pipe, attention_kwargs={"scale": 0.5})
    assert not close(half, full) and not close(half, before)
    assert torch.equal(run(pipe), full)


def test_fusing_and_unfusing(pipe, lora):
    before = run(pipe)
    pipe.load_lora_weights(lora)
    expected = run(pipe)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    assert close(run(pipe), expected)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    pipe.unload_lora_weights()
    assert close(run(pipe), before)


def test_a_fused_lora_stays_when_the_adapter_goes_and_is_saved_with_the_weights(pipe, lora, tmp_path):
    pipe.load_lora_weights(lora)
    expected = run(pipe)
    pipe.fuse_lora(lora_scale=1.0)
    pipe.unload_lora_weights()
    assert close(run(pipe), expected)
    pipe.save_pretrained(tmp_path / "fused")
    loaded = LongLivePipeline.from_pretrained(str(tmp_path / "fused"))
    loaded.set_progress_bar_config(disable=True)
    assert close(run(loaded), expected)


def test_fusing_weights_that_are_not_numbers_raises(pipe, lora):
    pipe.load_lora_weights(lora, adapter_name="mine")
    pipe.transformer.blocks[0].attn1.to_q.lora_A["mine"].weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN"):
        pipe.fuse_lora(safe_fusing=True)


# -- several adapters ------------------------------------------------------------------------------------------------


@pytest.fixture
def both(pipe, lora, second_lora) -> dict[str, torch.Tensor]:
    """The video without and with each of two adapters, `first` and `second`, which are loaded."""
    videos = {"none": run(pipe)}
    for name, folder in (("first", lora), ("second", second_lora)):
        pipe.load_lora_weights(folder, adapter_name=name)
        pipe.set_adapters(name)
        videos[name] = run(pipe)
    return videos


def test_adapters_are_listed(pipe, both):
    assert pipe.get_list_adapters() == {"transformer": ["first", "second"]}
    assert pipe.get_active_adapters() == ["second"]


def test_adapters_are_set_one_or_together(pipe, both):
    pipe.set_adapters("first")
    assert close(run(pipe), both["first"])
    pipe.set_adapters(["first", "second"])
    assert pipe.get_active_adapters() == ["first", "second"]
    together = run(pipe)
    assert not close(together, both["first"]) and not close(together, both["second"])


def test_adapters_are_weighted(pipe, both):
    pipe.set_adapters(["first", "second"], [0.0, 1.0])
    assert close(run(pipe), both["second"])
    pipe.set_adapters(["first", "second"], [0.3, 0.6])
    mixed = run(pipe)
    assert not close(mixed, both["first"]) and not close(mixed, both["second"])
    pipe.set_adapters("first", 0.0)
    assert close(run(pipe), both["none"])


def test_weights_may_be_given_by_component(pipe, both):
    pipe.set_adapters(["first"], [{"transformer": 0.0}])
    assert close(run(pipe), both["none"])


def test_adapters_are_disabled_and_enabled(pipe, both):
    pipe.disable_lora()
    assert close(run(pipe), both["none"])
    pipe.enable_lora()
    assert close(run(pipe), both["second"])


def test_adapters_are_deleted(pipe, both):
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {"transformer": ["first"]}
    pipe.set_adapters("first")
    assert close(run(pipe), both["first"])
    pipe.delete_adapters("first")
    assert close(run(pipe), both["none"])


def test_unknown_adapters_raise(pipe, both):
    with pytest.raises(ValueError, match="third"):
        pipe.set_adapters(["first", "third"])


def test_only_some_adapters_are_fused(pipe, both):
    pipe.set_adapters(["first"])
    pipe.fuse_lora(adapter_names=["first"])
    assert pipe.fused_loras == {"first"}
    assert close(run(pipe), both["first"])


def test_an_adapter_is_swapped_in_place(pipe, lora, second_lora):
    pipe.load_lora_weights(second_lora)
    expected = run(pipe)
    other = tiny_pipeline()
    other.load_lora_weights(lora, adapter_name="default_0")
    other.load_lora_weights(second_lora, adapter_name="default_0", hotswap=True)
    assert close(run(other), expected)


def test_a_compiled_network_takes_loras(pipe, lora, second_lora):
    """Also by diffusers' sequence for one after the other without compiling again."""
    other = tiny_pipeline()
    other.load_lora_weights(second_lora)
    expected = run(other)
    pipe.transformer.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(lora, adapter_name="mine")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch._dynamo.reset()
    run(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.load_lora_weights(second_lora, adapter_name="mine", hotswap=True)
        assert close(run(pipe), expected)
    pipe.load_lora_weights(lora, adapter_name="another")
    assert pipe.transformer.blocks[0].attn1.to_q.scaling == {"mine": 2.0, "another": 2.0}


# -- together with offloading ----------------------------------------------------------------------------------------


def test_a_lora_is_loaded_into_an_offloaded_pipeline(pipe, lora):
    pipe.load_lora_weights(lora)
    expected = run(pipe)
    other = tiny_pipeline()
    cpu = torch.device("cpu")
    other.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    other.load_lora_weights(lora)
    assert close(run(other), expected)


def test_a_lora_for_layers_that_are_stored_in_8_bits_is_refused(pipe, lora):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = run(pipe)
    with pytest.raises(ValueError, match=r"stored in 8 bits, for instance blocks.0.* load it before") as raised:
        pipe.load_lora_weights(lora)
    assert "\n" not in str(raised.value) and torch.equal(run(pipe), before)


# -- LongLive's own file ---------------------------------------------------------------------------------------------

GOLDEN_KEYS = ["<negative>", "The scene transitions. b", "The scene transitions. c", "a", "b", "c"]


@pytest.fixture
def golden_pipe() -> LongLivePipeline:
    return golden_pipeline(GOLDEN_KEYS, load_rollout("multi_shot")["embeds"])


def run_golden(pipe) -> torch.Tensor:
    return pipe(**tiny_arguments(prompt="a", max_sequence_length=GOLDEN_TEXT_LENGTH)).frames


@pytest.fixture
def merged(golden_pipe) -> torch.Tensor:
    """The video of a network into whose weights the golden LoRA was multiplied by hand."""
    transformer = golden_transformer()
    state, lora = transformer.state_dict(), read_original_lora(GOLDEN / "lora.pt")
    for key in [key for key in lora if ".lora_A." in key]:
        name = key.removeprefix("transformer.").replace(".lora_A.", ".")
        state[name] += lora[key.replace(".lora_A.", ".lora_B.")] @ lora[key]
    golden_pipe.register_modules(transformer=transformer)
    video = run_golden(golden_pipe)
    golden_pipe.register_modules(transformer=golden_transformer())
    return video


def test_the_published_file_is_loaded(golden_pipe, merged):
    before = run_golden(golden_pipe)
    golden_pipe.load_lora_weights(str(GOLDEN / "lora.pt"))
    assert close(run_golden(golden_pipe), merged) and not close(before, merged)
    golden_pipe.fuse_lora()
    golden_pipe.unload_lora_weights()
    assert close(run_golden(golden_pipe), merged)


def test_the_published_file_is_loaded_from_a_folder_by_its_name(golden_pipe, merged, tmp_path):
    """As from a repository of the Hub: `load_lora_weights("user/repo", weight_name="lora.pt")`."""
    shutil.copy(GOLDEN / "lora.pt", tmp_path / "lora.pt")
    golden_pipe.load_lora_weights(str(tmp_path), weight_name="lora.pt")
    assert close(run_golden(golden_pipe), merged)


def test_the_published_file_is_loaded_as_a_dictionary(golden_pipe, merged):
    golden_pipe.load_lora_weights(torch.load(GOLDEN / "lora.pt", weights_only=True))
    assert close(run_golden(golden_pipe), merged)
