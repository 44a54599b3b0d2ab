"""`train_ar.py --precision nvfp4`: all weights in 4-bit products, and a LoRA over weights stored in 4 bits."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.nvfp4 import NVFP4Config, nvfp4_layers, quantize_model
from longlive_diffusers.nvfp4.recipes import recipe_named
from run.arguments import parse_arguments
from run.log import read_log
from tests.support.training_run import options, run_script


CURVE = Path(__file__).with_name("nvfp4_loss_curve.json")
RUN = {"max_train_steps": 12, "precision": "nvfp4", "checkpointing_steps": 8}


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(folder / "training_log.jsonl")]


@pytest.fixture(scope="module")
def nvfp4_run(workshop, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("nvfp4") / "run"
    workshop.run(output, **RUN)
    return output


def test_a_fixed_seed_gives_the_committed_loss_curve(nvfp4_run):
    # Looser than without NVFP4: where another CPU sums in another order, a number may fall on the other side of a
    # border between two codes.
    assert losses(nvfp4_run) == pytest.approx(json.loads(CURVE.read_text()), rel=1e-2)


def test_it_resumes_as_if_nothing_had_happened(workshop, nvfp4_run, tmp_path):
    """The noise of stochastic rounding is of the random state, which a checkpoint keeps."""
    output = tmp_path / "run"
    workshop.run(output, **RUN, resume_from_checkpoint=nvfp4_run / "checkpoint-8")
    assert losses(output)[-4:] == losses(nvfp4_run)[-4:]
    weights = [
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (output, nvfp4_run)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_result_is_a_plain_pipeline_that_can_be_quantised(nvfp4_run):
    pipe = DiffusionPipeline.from_pretrained(nvfp4_run)
    assert type(pipe) is LongLivePipeline and not nvfp4_layers(pipe.transformer)
    card = (nvfp4_run / "README.md").read_text()
    assert "NVFP4, recipe longlive" in card
    assert f"`longlive quantize {nvfp4_run.name} --output FOLDER --recipe longlive`" in card
    quantize_model(pipe.transformer, NVFP4Config.from_recipe(recipe_named("longlive"), num_blocks=2))
    assert len(nvfp4_layers(pipe.transformer)) == 20


def test_a_lora_over_four_bit_weights(workshop, tmp_path):
    workshop.run(tmp_path / "run", max_train_steps=2, precision="nvfp4", rank=4, ema_decay=None)
    pipe = DiffusionPipeline.from_pretrained(workshop.folder / "pipeline")
    pipe.load_lora_weights(tmp_path / "run")
    assert any(".lora_B." in name for name, _ in pipe.transformer.named_parameters())


def test_a_quantised_start_is_dequantised_for_training_of_all_weights(workshop, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(workshop.folder / "pipeline")
    quantize_model(pipe.transformer, NVFP4Config()).save_pretrained(tmp_path / "start" / "transformer")
    pipe.save_pretrained(tmp_path / "start")
    folder = workshop.folder
    words = options(tmp_path / "start", folder / "videos", folder / "cache", tmp_path / "run", max_train_steps=1)
    run_script(words)
    assert not nvfp4_layers(DiffusionPipeline.from_pretrained(tmp_path / "run").transformer)


def test_unknown_recipes_are_refused(tmp_path):
    words = options(tmp_path, tmp_path, tmp_path, tmp_path, precision="nvfp4", nvfp4_recipe="best")
    with pytest.raises(ValueError, match="longlive, nvidia, nvfp4_pretrain, got 'best'"):
        parse_arguments(words)
