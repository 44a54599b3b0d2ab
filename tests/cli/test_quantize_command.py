"""`longlive quantize`: a pipeline in, the same in 4 bits out."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.cli import main
from longlive_diffusers.conversion.pipeline_folder import stored_dtype
from longlive_diffusers.nvfp4 import nvfp4_layers
from longlive_diffusers.nvfp4.recipes import RECIPES
from longlive_diffusers.nvfp4.training import train_in_nvfp4
from longlive_diffusers.video.reader import read_video
from tests.support.toy_checkpoints import save_original_lora


TOY = str(toy_pipeline_path())


def test_it_writes_a_pipeline_that_generates(tmp_path, capsys):
    output = tmp_path / "quantized"
    assert main(["quantize", TOY, "--output", str(output), "--weight-rule", "static_6", "--backend", "w4a16"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"layers in NVFP4: +\d+, such as blocks\.0\.attn1\.to_q: .*weight=static_6.*backend=w4a16", told)
    smaller = float(re.search(r"\((\d+\.\d+) times smaller\)", told)[1])
    plain, pipe = (DiffusionPipeline.from_pretrained(folder) for folder in (TOY, output))
    layers = nvfp4_layers(pipe.transformer)
    assert len(layers) == 10 * pipe.transformer.config.num_layers
    assert smaller > 2
    # What is not quantized is as it was stored.
    assert stored_dtype(output / "transformer") == stored_dtype(toy_pipeline_path() / "transformer")
    assert torch.equal(pipe.transformer.proj_out.weight, plain.transformer.proj_out.weight)
    config = json.loads((output / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["weight_scale_rule"] == "static_6" and config["activation_scale_rule"] == "mse"

    video = tmp_path / "video.mp4"
    options = ["--num-frames", "13", "--steps", "2", "--kv-cache", "nvfp4", "--seed", "0", "--no-progress"]
    assert main(["generate", "a red circle", "--model", str(output), "--output", str(video), *options]) == 0
    assert len(read_video(video)[0]) == 13


def test_a_lora_is_added_first(tmp_path):
    lora = save_original_lora(tmp_path / "lora.pt")
    for name, options in (("plain", []), ("with", ["--lora", str(lora)])):
        assert main(["quantize", TOY, "--output", str(tmp_path / name), *options]) == 0
    first, second = (
        nvfp4_layers(DiffusionPipeline.from_pretrained(tmp_path / name).transformer)["blocks.0.attn1.to_q"]
        for name in ("plain", "with")
    )
    assert not torch.equal(first.weight_codes, second.weight_codes)


def test_modules_are_kept_beside_the_default_ones(tmp_path):
    assert main(["quantize", TOY, "--output", str(tmp_path / "out"), "--keep", "attn1", "attn2"]) == 0
    layers = nvfp4_layers(DiffusionPipeline.from_pretrained(tmp_path / "out").transformer)
    assert {name.split(".", 2)[2] for name in layers} == {"ffn.net.0.proj", "ffn.net.2"}


def test_the_card_is_of_the_folder_and_says_what_it_holds(tmp_path):
    assert main(["quantize", TOY, "--output", str(tmp_path / "my-toy")]) == 0
    card = ModelCard.load(tmp_path / "my-toy" / "README.md")
    assert "# my-toy\n" in card.content and ".partial" not in card.content
    assert 'from_pretrained("my-toy"' in card.content
    assert "| weights of the transformer | NVFP4 (4 bits) |" in card.content and "nvfp4" in card.data.tags
    assert card.data.license == ModelCard.load(toy_pipeline_path() / "README.md").data.license == "apache-2.0"
    assert "The weights' license is `apache-2.0`" in card.content
    assert str(tmp_path) not in card.content and TOY not in card.content


def test_a_license_of_its_own_is_stated_with_its_name_and_link(tmp_path):
    source = Path(shutil.copytree(TOY, tmp_path / "source"))
    front = "license: other\nlicense_name: nvidia\nlicense_link: https://x.y/z\nbase_model: someone/base\n"
    (source / "README.md").write_text(f"---\n{front}---\n# Mine\n")
    assert main(["quantize", str(source), "--output", str(tmp_path / "out")]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "nvidia", "https://x.y/z")
    assert "[`nvidia`](https://x.y/z)" in card.content and card.data.base_model == "someone/base"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_stores_what_it_trained(tmp_path, capsys, name):
    recipe, output = RECIPES[name], tmp_path / "out"
    assert main(["quantize", TOY, "--output", str(output), "--recipe", name]) == 0
    assert ("blocks.0" in capsys.readouterr().out.split("kept as they were:")[1]) == (recipe.keep_first > 0)
    layers = nvfp4_layers(DiffusionPipeline.from_pretrained(output).transformer)
    trained = DiffusionPipeline.from_pretrained(TOY).transformer.float()
    assert list(layers) == train_in_nvfp4(trained, recipe)
    for layer_name, layer in layers.items():
        assert layer.activation_scale_rule == recipe.activation_rule
        linear = trained.get_submodule(layer_name)
        x = torch.randn(32, layer.in_features)
        with torch.no_grad():
            assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "is no folder"),
        ([TOY, "--recipe", "nvidia", "--block", "1x16", "--keep", "x"], "nvidia says what --block, --keep would"),
        ([TOY, "--lora", "none.pt"], "There is no LoRA file"),
        ([TOY, "--backend", "te"], "--backend te needs TransformerEngine"),
        ([TOY, "--backend", "scaled_mm"], "--backend scaled_mm needs a GPU of compute capability 10.0"),
        ([TOY, "--keep", "blocks"], "Nothing to quantize"),
        ([TOY, "--keep", "attn1", "attn3"], "has no module 'attn3' to keep as it is"),
        ([TOY, "--keep", "blocks.7"], "has no module 'blocks.7'"),
        ([TOY, "--lora", "none"], "The LoRA 'none' is no file, no folder, and no Hub repository that can be reached"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(tmp_path, capsys, arguments, message):
    assert main(["quantize", *arguments, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("longlive: error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_it_does_not_write_over_anything_nor_quantise_twice(tmp_path, capsys):
    assert main(["quantize", TOY, "--output", str(tmp_path / "out")]) == 0
    assert main(["quantize", TOY, "--output", str(tmp_path / "out")]) == 2
    assert "already holds" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "out"), "--output", str(tmp_path / "again")]) == 2
    assert "in NVFP4 already" in capsys.readouterr().err


def test_four_bits_need_heads_that_divide(tmp_path, capsys, monkeypatch):
    from longlive_diffusers.conversion.pipeline_folder import PipelineFolder

    find = PipelineFolder.find

    def odd_heads(source):
        folder = find(source)
        folder.transformer["attention_head_dim"] = 12
        return folder

    monkeypatch.setattr(PipelineFolder, "find", odd_heads)
    words = ["generate", "x", "--kv-cache", "nvfp4", "--output", str(tmp_path / "video.mp4")]
    assert main(words) == 2
    assert "multiples of 16, this network's is 12" in capsys.readouterr().err
