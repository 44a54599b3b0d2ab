"""`longlive convert --to original`: a LoRA in, a file that the reference implementation opens out."""

import shutil
from pathlib import Path

import pytest
import torch

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.cli import main
from longlive_diffusers.loaders import read_original_lora
from tests.support.toy_checkpoints import save_original_checkpoint
from tests.support.toy_loras import save_toy_lora


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    return save_toy_lora(tmp_path_factory.mktemp("lora"), seed=0)


@pytest.fixture(scope="module")
def full_checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original") / "model.pt"
    save_original_checkpoint(path)
    return path


def convert(source: object, *options: object) -> int:
    return main(["convert", str(source), "--to", "original", *map(str, options)])


@pytest.mark.parametrize("source", ["file", "folder"])
def test_the_reference_gets_the_same_numbers_under_its_own_names(tmp_path, capsys, lora, source):
    output = tmp_path / "generator_lora.pt"
    assert convert(lora if source == "file" else lora.parent, "--output", output) == 0
    assert capsys.readouterr().out == f"{output}: a LoRA of 50 layers, rank 16, float16\n"
    content = torch.load(output, weights_only=True)
    assert content.keys() == {"generator_lora"}
    name = "base_model.model.blocks.4.cross_attn.o.lora_B.weight"
    expected = LongLivePipeline.lora_state_dict(lora)
    assert torch.equal(content["generator_lora"][name], expected["transformer.blocks.4.attn2.to_out.0.lora_B.weight"])
    for found in (read_original_lora(output), LongLivePipeline.lora_state_dict(output)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_references_own_file_comes_out_as_it_went_in(tmp_path, golden):
    assert convert(golden / "lora.pt", "--output", tmp_path / "same.pth") == 0
    before, after = (
        torch.load(path, weights_only=True)["generator_lora"] for path in (golden / "lora.pt", tmp_path / "same.pth")
    )
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_dtype_is_the_stored_one_unless_asked_for(tmp_path, lora):
    assert convert(lora, "--output", tmp_path / "lora.pt", "--dtype", "float32") == 0
    found, expected = read_original_lora(tmp_path / "lora.pt"), LongLivePipeline.lora_state_dict(lora)
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_another_alpha_is_kept_by_the_weights(tmp_path):
    lora = save_toy_lora(tmp_path / "lora", seed=0, alpha=32)
    assert convert(lora, "--output", tmp_path / "lora.pt") == 0
    found, stored = read_original_lora(tmp_path / "lora.pt"), LongLivePipeline.lora_state_dict(lora)
    for name, tensor in stored.items():
        assert torch.equal(found[name], 2 * tensor if ".lora_B." in name else tensor)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("missing.pt", ["--output", "new.pt"], "There is no LoRA file 'missing.pt'"),
        ("empty.pt", ["--output", "new.pt"], "empty.pt (0 bytes) is not a checkpoint: it is empty"),
        ("full.pt", ["--output", "new.pt"], "full.pt is not a LoRA"),
        ("lora", ["--output", "new.safetensors"], "has to be a .pt or .pth file, which the reference opens"),
        ("lora", ["--output", "new"], "has to be a .pt or .pth file"),
        ("lora", ["--output", "full.pt"], "The output 'full.pt' is there already; give the name of a new file"),
        ("lora", ["--output", "nowhere/new.pt"], "the folder 'nowhere' does not exist"),
        ("lora", ["--output", "lora"], "it is a folder, not a file"),
        (
            "lora",
            ["--output", "new.pt", "--base", "x"],
            "--to original converts a LoRA alone; --base would do nothing",
        ),
        ("lora", ["--output", "new.pt", "--lora", "x", "--use-ema"], "--lora, --use-ema would do nothing"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    tmp_path, monkeypatch, capsys, lora, full_checkpoint, source, options, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty.pt").touch()
    shutil.copy(full_checkpoint, "full.pt")
    shutil.copytree(lora.parent, "lora")
    files = set(Path().iterdir())
    assert convert(source, *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("longlive: error: ") and message in line
    assert set(Path().iterdir()) == files


def test_numbers_that_the_dtype_cannot_hold_are_refused(tmp_path, capsys):
    lora = {
        f"transformer.blocks.0.attn1.to_q.lora_{half}.weight": torch.full(shape, 1e5)
        for half, shape in (("A", (4, 192)), ("B", (192, 4)))
    }
    torch.save(lora, tmp_path / "lora.pt")
    assert convert(tmp_path / "lora.pt", "--output", tmp_path / "new.pt", "--dtype", "float16") == 2
    assert "self_attn.q.lora_A.weight has 768 infinities or NaN among its 768 numbers" in capsys.readouterr().err
    assert not (tmp_path / "new.pt").exists()


def test_a_pipeline_needs_a_base(tmp_path, capsys, full_checkpoint):
    assert main(["convert", str(full_checkpoint), "--output", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("longlive: error: --base is needed: a pipeline that gives tokenizer, ")
    assert not (tmp_path / "new").exists()
