"""The pipeline saved and loaded, whole and in parts, in every dtype."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from tests.support.tiny_pipeline import CHANNELS, TEXT_LENGTH, tiny_arguments, tiny_pipeline, tiny_transformer
from tests.support.tiny_vae import tiny_vae, wan_2_1_vae


PROMPT = "a cat runs on the grass"
TEXT_COMPONENTS = {"tokenizer": None, "text_encoder": None}
OTHER_COMPONENTS = {"vae": None, "transformer": None, "scheduler": None}


@pytest.fixture
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


@pytest.fixture
def saved(pipe, tmp_path) -> str:
    pipe.save_pretrained(tmp_path)
    return str(tmp_path)


def load(folder: str, **settings) -> LongLivePipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **overrides):
    return pipe(**tiny_arguments(**overrides)).frames


# -- saving and loading ----------------------------------------------------------------------------------------------


def test_a_saved_pipeline_makes_the_same_video(pipe, saved):
    loaded = load(saved)
    assert type(loaded) is LongLivePipeline
    assert isinstance(loaded.tokenizer, PreTrainedTokenizerBase)
    np.testing.assert_array_equal(run(loaded, output_type="np"), run(pipe, output_type="np"))


def test_settings_are_saved(saved):
    loaded = load(saved)
    assert (loaded.config.window_size, loaded.config.sink_size) == (6, 2)
    assert load(saved, window_size=8).config.window_size == 8


def test_what_is_saved_does_not_name_the_folder_that_it_was_loaded_from(saved, tmp_path):
    load(saved).save_pretrained(tmp_path / "again")
    texts = [path.read_text() for path in (tmp_path / "again").rglob("*.json")]
    assert len(texts) > 5
    assert not any(str(tmp_path) in text or "_name_or_path" in text for text in texts)
    load(str(tmp_path / "again"))


@pytest.mark.parametrize("content", ['{"_name_or_path": "someone/else"}', "not JSON"])
def test_saving_leaves_files_of_others_in_the_folder_alone(pipe, tmp_path, content):
    other = tmp_path / "another_model" / "config.json"
    other.parent.mkdir()
    other.write_text(content)
    pipe.save_pretrained(tmp_path)
    assert other.read_text() == content


OPTIONAL = {"text": TEXT_COMPONENTS, "vae": {"vae": None}, "both": {**TEXT_COMPONENTS, "vae": None}}


@pytest.mark.parametrize("missing", OPTIONAL.values(), ids=OPTIONAL)
def test_a_pipeline_without_optional_components_is_saved_and_loaded(pipe, missing, tmp_path):
    tiny_pipeline(**missing).save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert {name for name, component in loaded.components.items() if component is None} == set(missing)
    embeds, _ = pipe.encode_prompt(PROMPT, None, False, max_sequence_length=TEXT_LENGTH)
    torch.testing.assert_close(run(loaded, prompt=None, prompt_embeds=embeds), run(pipe), atol=1e-5, rtol=1e-5)


def test_a_pipeline_of_text_alone_is_saved_and_loaded(pipe, tmp_path):
    tiny_pipeline(**OTHER_COMPONENTS).save_pretrained(tmp_path)
    loaded = load(str(tmp_path), transformer=None, scheduler=None)
    found, expected = (p.encode_prompt(PROMPT, max_sequence_length=TEXT_LENGTH)[0] for p in (loaded, pipe))
    assert torch.equal(found, expected)


def test_components_make_another_pipeline(pipe):
    again = LongLivePipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert set(pipe.components) == {"tokenizer", "text_encoder", "vae", "transformer", "scheduler"}
    arguments = {"window_size": 6, "sink_size": 2}
    assert torch.equal(run(again, **arguments), run(pipe, **arguments))


def test_from_pipe_shares_the_components_and_may_change_settings(pipe):
    other = LongLivePipeline.from_pipe(pipe, window_size=8)
    assert all(other.components[name] is component for name, component in pipe.components.items())
    assert (other.config.window_size, pipe.config.window_size) == (8, 6)
    assert other.config.sink_size == pipe.config.sink_size == 2


def test_a_component_given_replaces_the_saved_one(saved):
    other = tiny_transformer(seed=1)
    loaded = load(saved, transformer=other)
    assert loaded.transformer is other
    without = load(saved, text_encoder=None, tokenizer=None)
    assert without.text_encoder is None


def test_a_vae_that_is_assigned_brings_its_scales():
    """And latents that are wanted without it, later, have the size of those that it decodes."""
    pipe = tiny_pipeline(vae=None)
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (16, 4)
    pipe.vae = wan_2_1_vae(CHANNELS)
    assert run(pipe, height=64, width=32, output_type="np").shape == (1, 13, 64, 32, 3)
    assert pipe.vae_scale_factor_spatial == pipe.video_processor.config["vae_scale_factor"] == 8
    pipe.vae = None
    assert run(pipe, height=64, width=32).shape == (1, CHANNELS, 4, 8, 4)
    pipe.register_modules(vae=tiny_vae(CHANNELS))
    assert pipe.sizes.spatial_scale == 16


def test_auto_model_loads_components_by_subfolder(saved):
    assert isinstance(AutoModel.from_pretrained(saved, subfolder="transformer"), LongLiveTransformer3DModel)
    assert type(AutoModel.from_pretrained(saved, subfolder="vae")).__name__ == "AutoencoderKLWan"
    assert isinstance(LongLiveScheduler.from_pretrained(saved, subfolder="scheduler"), LongLiveScheduler)


def test_a_variant_is_saved_and_asked_for_by_name(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="bf16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.bf16.safetensors").exists()
    assert (tmp_path / "text_encoder" / "model.bf16.safetensors").exists()
    assert torch.equal(run(load(str(tmp_path), variant="bf16")), run(pipe))


def test_a_variant_that_is_not_there_raises(saved):
    with pytest.raises((ValueError, OSError), match="fp16"):
        load(saved, variant="fp16")


# -- dtypes and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_half_precision_gives_finite_videos(saved, dtype, guidance_scale):
    frames = run(load(saved, dtype=dtype), output_type="np", guidance_scale=guidance_scale)
    assert frames.dtype == np.float32 and np.isfinite(frames).all() and frames.std() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_pipeline_is_saved_and_loaded(saved, tmp_path, dtype):
    pipe = load(saved, dtype=dtype)
    pipe.save_pretrained(tmp_path / "half")
    loaded = load(str(tmp_path / "half"), dtype=dtype)
    assert torch.equal(run(loaded), run(pipe))


def test_half_precision_is_near_float32(pipe, saved):
    torch.testing.assert_close(run(load(saved, dtype=torch.bfloat16)), run(pipe), atol=0.1, rtol=0.1)


def test_torch_dtype_still_works_and_says_that_it_is_old(saved):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = load(saved, torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert any("`torch_dtype` is deprecated" in str(warning.message) for warning in caught)


def test_each_component_may_have_a_dtype(saved):
    pipe = load(saved, dtype={"transformer": torch.bfloat16, "vae": torch.float32, "default": torch.float16})
    assert (pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (
        torch.bfloat16, torch.float32, torch.float16,
    )  # fmt: skip
    assert np.isfinite(run(pipe, output_type="np", num_frames=5)).all()


def test_to_a_dtype_moves_every_model(pipe):
    pipe.to(torch.bfloat16)
    models = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    assert len(models) == 3 and all(model.dtype == torch.bfloat16 for model in models)
    assert np.isfinite(run(pipe, output_type="np", num_frames=5)).all()


def test_to_a_device_moves_every_model(pipe):
    pipe.to("meta")
    assert {p.device.type for m in (pipe.transformer, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {"meta"}
    assert pipe.device.type == "meta"


def test_device_map_cpu(pipe, saved):
    assert torch.equal(run(load(saved, device_map="cpu")), run(pipe))
