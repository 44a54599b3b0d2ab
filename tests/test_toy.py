"""The embedded pipeline is complete, small, and what its card says; everything is tried out on it."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from longlive_diffusers.assets import toy_pipeline_path


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def toy() -> LongLivePipeline:
    pipe = DiffusionPipeline.from_pretrained(toy_pipeline_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def build_toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_toy", ROOT / "training" / "build_toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def video_of(pipe: LongLivePipeline, prompt: str, seed: int = 0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_frames=21, generator=generator, output_type="pt", **options).frames[0]


def test_it_is_a_complete_pipeline_of_the_real_classes(toy):
    assert type(toy) is LongLivePipeline
    assert type(toy.transformer) is LongLiveTransformer3DModel
    assert type(toy.scheduler) is LongLiveScheduler
    assert isinstance(toy.vae, AutoencoderKLWan)
    assert isinstance(toy.text_encoder, UMT5EncoderModel)
    assert isinstance(toy.tokenizer, PreTrainedTokenizerFast)
    assert toy.config.window_size % toy.transformer.config.chunk_size == 0
    assert toy.config.sink_size % toy.transformer.config.chunk_size == 0


def test_it_is_a_few_megabytes():
    files = [path for path in toy_pipeline_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6


def test_its_sizes_fit_each_other(toy):
    config = toy.transformer.config
    assert config.in_channels == config.out_channels == toy.vae.config.z_dim
    assert config.text_dim == toy.text_encoder.config.d_model
    assert len(toy.tokenizer) <= toy.text_encoder.config.vocab_size
    assert (toy.vae_scale_factor_spatial, toy.vae_scale_factor_temporal) == (16, 4)  # as Wan2.2's VAE


def test_the_tokenizer_follows_t5(toy):
    tokenizer = toy.tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token) == (0, "</s>")
    tokens = tokenizer(["a red circle", ""], padding="max_length", max_length=6, return_tensors="pt")
    assert tokens.input_ids[0].tolist()[-3:] == [tokenizer.eos_token_id, 0, 0]
    assert tokens.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    cut = tokenizer("circle " * 50, truncation=True, max_length=8).input_ids
    assert len(cut) == 8 and cut[-1] == tokenizer.eos_token_id


def test_a_word_of_the_captions_is_one_token(toy, build_toy):
    for word in ("red", "triangle", "bounces", "forest", "lighthouse"):
        assert len(toy.tokenizer(word).input_ids) == 2, word
    assert any("triangle bounces" in caption for caption in build_toy.captions())


@pytest.mark.parametrize("text", ["ünïcode", "日本語 🦊", "\x00\ud7ff", "naïve 'quotes' & <tags>", "١٢٣", "a_b-c/d"])
def test_any_text_survives_the_tokenizer(toy, text):
    ids = toy.tokenizer(text).input_ids
    assert toy.tokenizer.unk_token_id not in ids
    assert toy.tokenizer.decode(ids, skip_special_tokens=True) == text.lower()


def test_a_video_is_neither_flat_nor_clipped(toy):
    video = video_of(toy, "a red circle moves left")
    side = toy.transformer.config.sample_height * toy.vae_scale_factor_spatial
    assert video.shape == (21, 3, side, side)
    assert torch.isfinite(video).all()
    assert (video.std(dim=(1, 2, 3)) > 0.05).all()  # in space, of every frame
    assert (video[1:] - video[:-1]).abs().mean() > 0.01  # in time
    assert ((video == 0) | (video == 1)).float().mean() < 0.1


def test_prompt_and_seed_matter(toy):
    video = video_of(toy, "a red circle moves left")
    assert torch.equal(video_of(toy, "a red circle moves left"), video)
    assert (video_of(toy, "a blue square falls") - video).abs().mean() > 1e-3
    assert (video_of(toy, "a red circle moves left", seed=1) - video).abs().mean() > 1e-2


def test_latents_of_pictures_are_about_normal(toy):
    """The statistics in the VAE's config are those of what it encodes."""
    side = toy.transformer.config.sample_height * toy.vae_scale_factor_spatial
    coarse = torch.rand(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, size=(1, side, side), mode="trilinear")
    latents = toy.encode_video(pixels)
    assert latents.mean().abs() < 0.5
    assert 0.5 < latents.std() < 2


def test_the_script_builds_these_very_files(toy, build_toy):
    built = build_toy.build_pipeline()
    vocabulary = [json.loads(pipe.tokenizer.backend_tokenizer.to_str())["model"]["vocab"] for pipe in (built, toy)]
    assert vocabulary[0] == vocabulary[1]
    assert {**built.config, "_name_or_path": None} == {**toy.config, "_name_or_path": None}
    for name in ("text_encoder", "vae", "transformer"):
        expected, found = toy.components[name].state_dict(), built.components[name].state_dict()
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, atol=1e-4, rtol=1e-4)


def test_the_card_is_honest():
    card = (toy_pipeline_path() / "README.md").read_text()
    assert "untrained" in card and "random" in card
    assert "build_toy.py" in card
