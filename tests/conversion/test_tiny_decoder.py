"""Tiny decoders on disk: a folder, a repository's files or a published file opens; what is none is refused by name."""

import json
from pathlib import Path

import pytest
import torch

from longlive_diffusers import TinyVideoDecoder
from longlive_diffusers.assets import toy_decoder_path, toy_pipeline_path
from longlive_diffusers.cli import main
from longlive_diffusers.conversion.tiny_decoder import convert_tiny_decoder, load_tiny_decoder
from tests.support.taehv import taew2_2_decoder, taew2_2_state_dict


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A file like the published one, narrower, in float16."""
    torch.manual_seed(0)
    weights = taew2_2_state_dict(taew2_2_decoder((16, 12, 8, 8)))
    path = tmp_path_factory.mktemp("taehv") / "taew2_2.pth"
    torch.save({name: tensor.half() for name, tensor in weights.items()}, path)
    return path


def same_weights(one: TinyVideoDecoder, other: TinyVideoDecoder) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_published_file_and_its_folder_are_the_same_decoder(tmp_path, published):
    folder = convert_tiny_decoder(published, tmp_path / "decoder")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    of_folder, of_file = load_tiny_decoder(folder), load_tiny_decoder(str(published))
    assert of_folder.dtype == of_file.dtype == torch.float16  # as stored
    assert not of_folder.training and not of_file.training
    assert same_weights(of_folder, of_file)
    assert same_weights(TinyVideoDecoder.from_pretrained(folder, torch_dtype=torch.float16), of_file)
    assert "taehv" not in (folder / "config.json").read_text()  # no folder of this machine


def test_the_command_writes_the_folder_and_says_what_it_is(tmp_path, published, capsys):
    folder = tmp_path / "decoder"
    command = ["convert", str(published), "--to", "tiny", "--output", str(folder), "--dtype", "bfloat16"]
    assert main(command) == 0
    assert capsys.readouterr().out == (
        f"{folder}: a decoder of 0.06 M parameters for latents of 48 channels, 16x16 pixels and 4 frames each\n"
    )
    expected = TinyVideoDecoder.from_original(published, torch_dtype=torch.bfloat16)
    assert same_weights(load_tiny_decoder(folder), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "x"], "--to tiny converts a tiny decoder alone; --base would do nothing"),
        (["--lora", "x", "--use-ema"], "--to tiny converts a tiny decoder alone; --lora, --use-ema would do nothing"),
        (["--output", "full"], "The output full already holds 1 files or folders"),
        (["missing.pth"], "There is no checkpoint file missing.pth"),
        (["empty.pth"], "empty.pth (0 bytes) is not a checkpoint: it is empty"),
        (["cut.pth"], "cut.pth"),
        (["vae.safetensors"], "holds no tiny decoder (TAEHV): there is no decoder.1.weight among its"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, monkeypatch, capsys, published, options, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.pth").touch()
    Path("cut.pth").write_bytes(published.read_bytes()[:2000])
    Path("vae.safetensors").symlink_to(toy_pipeline_path() / "vae" / "diffusion_pytorch_model.safetensors")
    Path("full").mkdir()
    Path("full/file").touch()
    source = [] if options[0].endswith((".pth", ".safetensors")) else [str(published)]
    output = [] if "--output" in options else ["--output", "new"]
    assert main(["convert", *source, *options, "--to", "tiny", *output]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("longlive: error: ") and message in line
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "'missing' is no folder, and no Hub repository that can be reached"),
        ("empty", "'empty' holds no tiny decoder: there is no config.json in it"),
        ("pipeline", "'pipeline' holds no tiny decoder"),
        ("pipeline/vae", "'pipeline/vae' is a AutoencoderKLWan, not a TinyVideoDecoder"),
        ("half", "half/diffusion_pytorch_model.safetensors"),
        ("other", "'other' cannot be opened: Cannot load  because conv_in.weight expected shape"),
        ("typed", "patch_size has to be a whole number, got 'two'"),
        ("deeper", "lacks 36 of its weights"),
        ("text.json", "is not a checkpoint: it is a JSON file"),
    ],
)
def test_what_is_no_decoder_is_refused_by_name(tmp_path, monkeypatch, published, name, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.json").write_text("{}")
    Path("pipeline").symlink_to(toy_pipeline_path())
    changes = {"half": {}, "other": {"latent_channels": 16}, "typed": {"patch_size": "two"}}
    for folder, change in {**changes, "deeper": {"layers_per_block": 5}}.items():
        config = convert_tiny_decoder(published, folder) / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    Path("half/diffusion_pytorch_model.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError) as caught:
        load_tiny_decoder(name)
    assert message in str(caught.value), caught.value
    assert torch.get_default_dtype() == torch.float32


def test_the_embedded_decoder_opens():
    decoder = load_tiny_decoder(toy_decoder_path())
    assert (decoder.config.latent_channels, decoder.spatial_scale, decoder.temporal_scale) == (16, 8, 4)
