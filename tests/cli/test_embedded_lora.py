"""The distilled LoRAs of the embedded model, which `longlive generate` uses unless it is told otherwise.

Random LoRAs take the place of the real ones, so that it can be seen which of them made a video.
"""

from pathlib import Path

import pytest
import torch

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.assets import TOY_LORA_STEPS, toy_lora_path, toy_pipeline_path
from longlive_diffusers.cli import main
from longlive_diffusers.conversion.pipeline_folder import PipelineFolder, fuse_lora
from longlive_diffusers.nvfp4.linear import nvfp4_layers
from longlive_diffusers.video.reader import read_video
from tests.support.toy_loras import save_toy_lora


COMMAND = ["generate", "a red circle", "--num-frames", "5", "--no-progress", "--output", "video.mp4"]
USED = "longlive: using the LoRA for {} steps of the embedded model\n"
NONE = "longlive: no LoRA is used: the embedded model's are for "


class LoadedError(Exception):
    """Ends a command when its models are to be loaded."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("toy_loras")
    return {steps: save_toy_lora(folder / f"lora_{steps}", seed=steps) for steps in TOY_LORA_STEPS}


@pytest.fixture(autouse=True)
def other_files(monkeypatch, tmp_path, files) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("longlive_diffusers.cli.embedded_lora.toy_lora_path", files.__getitem__)


@pytest.fixture
def asked(monkeypatch) -> list[Path | None]:
    """What was to be fused, each time that models were to be loaded."""
    asked = []

    def load(self, *, fused_lora, **options):
        asked.append(fused_lora)
        raise LoadedError

    monkeypatch.setattr(PipelineFolder, "load", load)
    return asked


def test_there_is_one_for_each_of_the_stated_numbers_of_steps():
    folder = toy_pipeline_path().parent / "toy_loras"
    for steps in TOY_LORA_STEPS:
        assert toy_lora_path(steps) == folder / f"{steps}_steps" / "pytorch_lora_weights.safetensors"
    for steps in (1, 3, 30, 0, None):
        with pytest.raises(ValueError, match=rf"for 4 and 2 steps, there is none for {steps}\."):
            toy_lora_path(steps)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ([], 4),
        (["--steps", "4"], 4),
        (["--steps", "2"], 2),
        (["--steps", "2", "--guidance-scale", "0"], 2),
        (["--nvfp4", "emulate", "--kv-cache-dtype", "nvfp4", "--compile", "--dtype", "bfloat16"], 4),
    ],
)
def test_the_one_for_the_steps_is_used(asked, files, capsys, options, steps):
    with pytest.raises(LoadedError):
        main([*COMMAND, *options])
    assert asked == [files[steps]]
    assert capsys.readouterr().err.startswith(USED.format(steps))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "1"], f"{NONE}4 and 2 steps, not for 1\n"),
        (["--steps", "3"], f"{NONE}4 and 2 steps, not for 3\n"),
        (["--steps", "30"], f"{NONE}4 and 2 steps, not for 30\n"),
        (["--guidance-scale", "2"], f"{NONE}no guidance (--guidance-scale 1), not for 2\n"),
        (["--steps", "30", "--guidance-scale", "1.5"], f"{NONE}no guidance (--guidance-scale 1), not for 1.5\n"),
        (["--no-lora"], ""),
        (["--model", str(toy_pipeline_path())], ""),
        (["--model", str(toy_pipeline_path()), "--no-lora"], ""),
    ],
)
def test_none_is_used_for_anything_else(asked, capsys, options, said):
    with pytest.raises(LoadedError):
        main([*COMMAND, *options])
    assert asked == [None]
    assert capsys.readouterr().err == said


def test_a_lora_of_the_users_replaces_it(asked, files, capsys):
    with pytest.raises(LoadedError):
        main([*COMMAND, "--lora", str(files[2])])
    assert asked == [None]
    assert capsys.readouterr().err == ""


def test_a_missing_file_is_told_and_done_without(monkeypatch, tmp_path, capsys):
    missing = tmp_path / "missing.safetensors"
    monkeypatch.setattr("longlive_diffusers.cli.embedded_lora.toy_lora_path", lambda steps: missing)
    assert main([*COMMAND, "--steps", "2"]) == 0
    line = f"longlive: no LoRA is used: the embedded model's for 2 steps is missing: there is no file '{missing}'\n"
    assert capsys.readouterr().err == line


def velocity(pipe: LongLivePipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 4, 8, 8, generator=generator)
    embeds = torch.randn(1, 12, 64, generator=generator)
    with torch.no_grad():
        return pipe.transformer(latents, torch.full((1,), 600.0), embeds).sample


def load(**options) -> LongLivePipeline:
    return PipelineFolder.find(toy_pipeline_path()).load(device=torch.device("cpu"), show_progress=False, **options)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_it_is_fused_exactly(files):
    plain, expected = velocity(load()), velocity(load(loras=[(str(files[4]), 1.0)]))
    fused = load(fused_lora=files[4])
    assert not hasattr(fused.transformer, "peft_config")
    assert relative_error(velocity(fused), expected) < 1e-5 < 0.1 < relative_error(plain, expected)


def test_it_is_fused_before_weights_are_rounded_to_four_bits(files):
    """Fused afterwards, the sum is rounded twice."""
    exact = velocity(load(fused_lora=files[4]))
    fused = load(fused_lora=files[4], nvfp4_backend="w4a16")
    beside = load(loras=[(str(files[4]), 1.0)], nvfp4_backend="w4a16")
    afterwards = load(loras=[(str(files[4]), 1.0)], nvfp4_backend="w4a16")
    fuse_lora(afterwards)
    assert len(nvfp4_layers(fused.transformer)) == 50
    error = relative_error(velocity(fused), exact)
    assert error < 1.1 * relative_error(velocity(beside), exact)
    assert error < 0.9 * relative_error(velocity(afterwards), exact)


def test_the_video_is_that_of_the_lora(files):
    videos = {}
    for name, options in {"embedded": [], "named": ["--lora", str(files[4])], "without": ["--no-lora"]}.items():
        assert main([*COMMAND, "--seed", "0", *options]) == 0
        videos[name] = read_video(Path("video.mp4"))[0].astype(float)
    # H.264 rounds what differs in the last digits.
    assert abs(videos["embedded"] - videos["named"]).mean() < 0.5 < abs(videos["embedded"] - videos["without"]).mean()
