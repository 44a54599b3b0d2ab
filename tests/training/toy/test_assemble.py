"""Putting the toy pipeline together, before and after its transformer is trained."""

import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import UMT5Config, UMT5EncoderModel

from assemble import main
from longlive_diffusers import LongLivePipeline
from tests.support.training_run import toy_tokenizer as tiny_tokenizer
from train_vae import build_vae


@pytest.fixture
def parts(tmp_path):
    """Folders as `train_text.py` and `train_vae.py` leave them."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "text" / "tokenizer")
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(tmp_path / "text" / "text_encoder")
    build_vae(8).save_pretrained(tmp_path / "vae")
    return ["--text", str(tmp_path / "text"), "--vae", str(tmp_path / "vae")]


def assemble(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["assemble.py", *words])
    main()


def test_the_start_is_a_whole_pipeline_that_predicts_nothing_yet(parts, tmp_path, monkeypatch):
    assemble(monkeypatch, *parts, "--output", str(tmp_path / "start"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "start")
    assert type(pipe) is LongLivePipeline
    with torch.no_grad():
        velocity = pipe.transformer(torch.randn(1, 16, 2, 8, 8), torch.ones(1), torch.randn(1, 32, 16)).sample
    assert not velocity.any()
    assert pipe("a red circle", num_frames=5, num_inference_steps=1).frames.shape == (1, 5, 64, 64, 3)


def test_the_result_is_stored_in_half_precision_beside_the_card_that_is_there(parts, tmp_path, monkeypatch):
    assemble(monkeypatch, *parts, "--output", str(tmp_path / "trained"))
    output = tmp_path / "toy"
    (output / "vae").mkdir(parents=True)
    (output / "README.md").write_text("what was measured")
    (output / "vae" / "left over").write_text("from an older one")
    assemble(monkeypatch, *parts, "--trained", str(tmp_path / "trained"), "--output", str(output))
    assert (output / "README.md").read_text() == "what was measured"
    assert not (output / "vae" / "left over").exists()
    sizes = [
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
        for folder in (output, tmp_path / "trained")
    ]
    assert not any(str(tmp_path) in path.read_text() for path in output.rglob("*.json"))
    assert sizes[0] < 0.55 * sizes[1]
    pipe = DiffusionPipeline.from_pretrained(output)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
