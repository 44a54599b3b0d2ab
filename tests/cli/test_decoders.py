"""`longlive generate --decoder`: who makes the frames, and what is said of a decoder that cannot."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longlive_diffusers import StreamingTinyDecoder, TinyVideoDecoder
from longlive_diffusers.assets import toy_decoder_path, toy_pipeline_path
from longlive_diffusers.cli import main
from longlive_diffusers.conversion.pipeline_folder import PipelineFolder
from longlive_diffusers.video.reader import read_video


COMMAND = ["generate", "a red circle", "--num-frames", "13", "--seed", "0", "--no-progress", "--output", "video.mp4"]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def decoded(monkeypatch) -> list[StreamingTinyDecoder]:
    """The stream of each call of a tiny decoder."""
    calls, decode = [], StreamingTinyDecoder.decode

    def recording(self, latents):
        calls.append(self)
        return decode(self, latents)

    monkeypatch.setattr(StreamingTinyDecoder, "decode", recording)
    return calls


def make(*options: str) -> np.ndarray:
    assert main([*COMMAND, *options]) == 0
    return read_video("video.mp4")[0].astype(float) / 255


def test_tiny_is_the_embedded_decoder_and_its_frames_are_close_to_the_vaes(decoded):
    by_vae = make()
    assert np.array_equal(make("--decoder", "vae"), by_vae) and decoded == []
    tiny = make("--decoder", "tiny")
    assert len(decoded) == 2 and decoded[0].decoder.dtype == torch.float32
    assert 0 < np.abs(tiny - by_vae).mean() < 0.02
    assert np.array_equal(make("--decoder", str(toy_decoder_path())), tiny)
    assert np.array_equal(make("--decoder", "tiny", "--stream"), tiny)


def test_a_folder_is_for_any_model(decoded):
    torch.manual_seed(0)
    sizes = {"time_upscale": (True, True), "space_upscale": (True, True)}
    TinyVideoDecoder(latent_channels=16, block_out_channels=(8, 8, 8), **sizes).save_pretrained("mine")
    other = make("--decoder", "mine", "--model", str(toy_pipeline_path()))
    assert len(other) == 13 and len(decoded) == 2
    assert decoded[0].decoder.config.block_out_channels == [8, 8, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decoder", "missing"], "'missing' is no folder, and no Hub repository that can be reached"),
        (["--decoder", "tiny", "--model", "TOY"], "--decoder tiny is that of the embedded model; for another --model"),
        (["--decoder", "TOY"], "holds no tiny decoder"),
        (["--decoder", "wan22"], "48 channels that span 16x16 pixels and 4 frames; this pipeline's have 16 channels"),
    ],
)
def test_a_decoder_that_cannot_is_one_line_before_the_models_are_loaded(monkeypatch, capsys, options, message):
    monkeypatch.setattr(PipelineFolder, "load", None)
    TinyVideoDecoder(block_out_channels=(8, 8, 8, 8)).save_pretrained("wan22")
    assert main([*COMMAND, *(option.replace("TOY", str(toy_pipeline_path())) for option in options)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("longlive: error: ") and message in line
    assert not Path("video.mp4").exists()
