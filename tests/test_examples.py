"""Every example runs as its first line says, on the embedded toy, and leaves a video that plays."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.conversion.pipeline_folder import PipelineFolder
from longlive_diffusers.video.reader import read_video
from tests.support.live_server import embedded_pipeline, running_server
from tests.support.paths import ROOT
from tests.support.processes import run_ranks
from tests.support.toy_checkpoints import save_original_checkpoint, save_original_lora


EXAMPLES = ROOT / "examples"
TOY = PipelineFolder.find(toy_pipeline_path())
# `quickstart.py` runs with the steps that all have by default, see below; for the others, these are enough to see by.
STEPS = ("--steps", 4)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs an example in a folder of its own; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def whole_chunks(frames: int) -> int:
    """What the toy makes of so many frames."""
    chunk = TOY.vae["scale_factor_temporal"] * TOY.transformer["chunk_size"]
    return -(-(frames + 3) // chunk) * chunk - 3


def frames_of(path: Path) -> np.ndarray:
    frames, fps = read_video(path)
    assert fps == 24
    assert frames.std() > 5  # something is there to be seen
    return frames


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tested] == []


def test_quickstart(tmp_path, run):
    run("quickstart.py")
    scale = TOY.vae["scale_factor_spatial"]
    height, width = (scale * TOY.transformer[name] for name in ("sample_height", "sample_width"))
    assert frames_of(tmp_path / "video.mp4").shape == (whole_chunks(45), height, width, 3)


def test_multi_shot(tmp_path, run):
    run("multi_shot.py", *STEPS, "--output", "shots.mp4")
    assert len(frames_of(tmp_path / "shots.mp4")) == 8 * 4 * TOY.transformer["chunk_size"] - 3


def test_streaming_prompt_switch(tmp_path, run):
    told = run("streaming_prompt_switch.py", *STEPS).splitlines()
    assert [line.split(",")[0] for line in told] == [f"chunk {index}" for index in range(10)]
    assert any("shot 0" in line and "green" in line for line in told)
    assert "shot 1: A small white square" in told[-1]
    assert len(frames_of(tmp_path / "video.mp4")) == 10 * 4 * TOY.transformer["chunk_size"] - 3


def test_image_to_video(tmp_path, run):
    run("image_to_video.py", *STEPS, "--output", "drawn.mp4")
    Image.new("RGB", (60, 50), "black").save(tmp_path / "black.png")
    run("image_to_video.py", *STEPS, "--image", "black.png")
    drawn, given = frames_of(tmp_path / "drawn.mp4"), frames_of(tmp_path / "video.mp4")
    assert len(drawn) == len(given) == whole_chunks(45)
    assert np.abs(drawn[0].astype(int) - given[0]).mean() > 2


def test_four_bits(tmp_path, run):
    assert "NVFP4Linear" in run("four_bits.py", *STEPS)
    assert len(frames_of(tmp_path / "video.mp4")) == whole_chunks(45)


def test_load_lora(tmp_path, run):
    run("load_lora.py", save_original_lora(tmp_path / "lora.pt"), *STEPS)
    assert len(frames_of(tmp_path / "video.mp4")) == whole_chunks(29)


def test_convert_original_checkpoint(tmp_path, run):
    save_original_checkpoint(tmp_path / "model.pt")
    base = toy_pipeline_path()
    told = run("convert_original_checkpoint.py", "model.pt", "--base", base, "--output", "converted")
    config = DiffusionPipeline.from_pretrained(tmp_path / "converted").transformer.config
    assert f"LongLivePipeline, {config.num_layers} layers, chunks of {config.chunk_size} latent frames" in told
    run("quickstart.py", *STEPS, "--model", "converted")
    assert len(frames_of(tmp_path / "video.mp4")) == whole_chunks(45)


def test_several_gpus(tmp_path):
    output = tmp_path / "shared.mp4"
    for status, printed in run_ranks(EXAMPLES / "several_gpus.py", 2, "--output", output):
        assert status == 0, printed
    assert len(frames_of(output)) == 8 * 4 * TOY.transformer["chunk_size"] - 3


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_first_line_says_how_to_run_it(path):
    lines = path.read_text().splitlines()
    start = "torchrun --nproc-per-node 2" if path.stem == "several_gpus" else "python"
    assert f"{start} examples/{path.name}" in lines[0]
    assert len(lines) <= 50


def test_those_with_steps_have_the_options_of_the_quickstart():
    def options(path: Path) -> list[str]:
        return [
            line
            for line in path.read_text().splitlines()
            if "args.steps" in line or "args.guidance" in line or '"--steps"' in line or '"--guidance"' in line
        ]

    expected = [line.strip() for line in options(EXAMPLES / "quickstart.py")]
    assert len(expected) == 4
    for path in EXAMPLES.glob("*.py"):
        if options(path):
            assert [line.strip() for line in options(path)] == expected, path.name


def test_live_client_without_a_server(tmp_path, run):
    with pytest.raises(SystemExit, match=r"no server at ws:.*: start one with `longlive serve`"):
        run("live_client.py", "--url", "ws://127.0.0.1:1/ws")
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_live_client(tmp_path, run):
    with running_server({None: embedded_pipeline()}) as server:
        printed = run("live_client.py", "--url", f"ws://{server.host}:{server.port}/ws")
    started, *chunks, end = printed.splitlines()
    assert started.startswith("type started, ") and end == "type end, reason finished, num_frames 101"
    shots = [chunk.split(":")[0].split(", ")[1] for chunk in chunks]
    assert shots[0] == "shot 0" and shots[-1] == "shot 1"
    frames = frames_of(tmp_path / "video.mp4")
    assert frames.shape == (101, 64, 64, 3)
    # The circle is red, and becomes blue; the last shot is white.
    assert frames[4, ..., 0].max() > 150 > frames[4, ..., 2].max()
    assert frames[44, ..., 2].max() > 150 > frames[44, ..., 0].max()
