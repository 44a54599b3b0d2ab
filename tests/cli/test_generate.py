"""`longlive generate` on the embedded toy: the file plays, is what was asked for, and errors are one line, at once."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.cli import generate, main
from longlive_diffusers.cli.generation_request import at_frame_rate
from longlive_diffusers.conversion.pipeline_folder import PipelineFolder, stored_dtype
from longlive_diffusers.video.reader import read_video
from longlive_diffusers.video.writer import VideoWriter
from tests.support.paths import ROOT
from tests.support.toy_checkpoints import save_original_lora


if TYPE_CHECKING:
    from tests.support.hub import Hub


@pytest.fixture(autouse=True)
def progress_bars_as_before() -> Iterator[None]:
    yield
    diffusers_logging.enable_progress_bar()
    transformers_logging.enable_progress_bar()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.mp4"


def make(output: Path, *arguments: object, seed: int = 0) -> np.ndarray:
    """Run the command; the frames of the file, in [0, 1]."""
    command = ["generate", *map(str, arguments), "--output", str(output), "--seed", str(seed), "--no-progress"]
    assert main(command) == 0
    frames, fps = read_video(output)
    assert fps == 24
    return frames / 255


def coarse(frames: np.ndarray) -> np.ndarray:
    """Means of 16x16 pixels: what a codec, which halves the resolution of colors, keeps."""
    count, height, width, channels = frames.shape
    return frames.reshape(count, height // 16, 16, width // 16, 16, channels).mean(axis=(2, 4))


def difference(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).mean())


def test_the_file_holds_the_pipelines_video_and_the_numbers_are_told(output, capsys):
    frames = make(output, "a red circle", "--num-frames", 21)
    pipe = DiffusionPipeline.from_pretrained(toy_pipeline_path())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("a red circle", num_frames=21, generator=torch.Generator().manual_seed(0)).frames[0]
    assert frames.shape == expected.shape
    other = make(output, "a red circle", "--num-frames", 21, seed=1)
    assert difference(coarse(frames), coarse(expected)) < 0.01
    assert difference(coarse(other), coarse(expected)) > 0.003

    report = capsys.readouterr().out
    assert re.search(r"frames: +21 \(3 chunks\)", report)
    assert re.search(r"duration: +0\.88 s at 24 frames per second, seed 0", report)
    assert re.search(r"time to first frame: \d+\.\d\d s \(.*decode.*\)", report)
    assert re.search(r"frames per second: +\d+\.\d\d \(.*writing", report)
    assert re.search(r"peak memory: +\d+\.\d+ [MG]iB \(resident", report)
    assert str(output) in report


def test_the_default_is_about_five_seconds(output):
    assert 5 <= len(make(output, "a red circle", "--steps", 1)) / 24 < 5.5


def test_seconds_are_rounded_up_to_whole_chunks(output):
    assert len(make(output, "a red circle", "--seconds", 0.6)) == 21  # 3 chunks; 2 are 13 frames


def test_options_reach_the_pipeline(output):
    plain = make(output, "a red circle", "--num-frames", 13)
    assert make(output, "x", "--num-frames", 13, "--height", 64, "--width", 96).shape == (13, 64, 96, 3)
    for options in (
        ["--steps", 2],
        ["--guidance-scale", 3, "--negative-prompt", "blue"],
        ["--dtype", "bfloat16"],
    ):
        assert difference(make(output, "a red circle", "--num-frames", 13, *options), plain) > 1e-4
    # These matter once the window is full.
    plain = make(output, "a red circle", "--num-frames", 37, "--window-size", 6, "--sink-size", 2)
    for options in (["--window-size", 8, "--sink-size", 2], ["--window-size", 6, "--sink-size", 0]):
        assert difference(make(output, "a red circle", "--num-frames", 37, *options), plain) > 1e-4
    rope = ["--window-size", 6, "--sink-size", 2, "--relative-rope"]
    assert difference(make(output, "a red circle", "--num-frames", 37, *rope), plain) > 1e-4


def test_a_lora_changes_the_video(output, tmp_path, capsys):
    lora = save_original_lora(tmp_path / "lora.pt")
    plain = make(output, "a red circle", "--num-frames", 13)
    assert difference(make(output, "a red circle", "--num-frames", 13, "--lora", lora), plain) > 1e-3
    misfit = save_original_lora(tmp_path / "misfit.pt", width=96)
    assert main(["generate", "x", "--lora", str(misfit), "--output", str(output)]) == 2
    assert "The LoRA is for another model" in capsys.readouterr().err


# -- shots, images, videos -------------------------------------------------------------------------------------------


def test_several_prompts_are_shots(output, capsys):
    make(output, "a red circle", "a blue square", "--num-frames", 29, "--stream")
    shots = re.findall(r"chunk (\d+), shot (\d+): .* '(.*)'", capsys.readouterr().out)
    red, blue = "a red circle", "a blue square"
    assert shots == [("0", "0", red), ("1", "0", red), ("2", "1", blue), ("3", "1", blue)]


def test_a_shots_file_says_how_long_shots_last(output, tmp_path, capsys):
    path = tmp_path / "shots.txt"
    path.write_text("[1] a red circle\n[2] a blue square\n")
    assert len(make(output, "--shots-file", path)) == 21
    assert len(make(output, "--shots-file", path, "--seconds", 1.2, "--stream")) == 29  # the last shot goes on
    shots = re.findall(r"chunk \d+, shot (\d+)", capsys.readouterr().out)
    assert shots == ["0", "1", "1", "1"]


def test_an_image_is_the_first_frame(output, tmp_path):
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    red = make(output, "x", "--num-frames", 13, "--image", tmp_path / "red.png")
    Image.new("RGB", (40, 30), (0, 0, 255)).save(tmp_path / "blue.png")
    blue = make(output, "x", "--num-frames", 13, "--image", tmp_path / "blue.png")
    assert difference(red[0], blue[0]) > 0.01


def test_a_video_is_continued(output, tmp_path, capsys):
    first = make(tmp_path / "first.mp4", "a red circle", "--num-frames", 13)
    continued = make(output, "a blue square", "--video", tmp_path / "first.mp4", "--seconds", 1)
    assert len(continued) == 29
    assert re.search(r"frames: +29, 13 of them continued \(4 chunks\)", capsys.readouterr().out)
    pipe = DiffusionPipeline.from_pretrained(toy_pipeline_path())
    pixels = torch.from_numpy(first).permute(3, 0, 1, 2)[None].float() * 2 - 1
    seen = pipe.decode_latents(pipe.encode_video(pixels))[0]  # not quite what it was given
    assert difference(coarse(continued[:13]), coarse(seen)) < 0.01


def test_another_frame_rate_becomes_the_models():
    frames = np.arange(60)[:, None, None, None]
    assert at_frame_rate(frames, 30.0)[:, 0, 0, 0].tolist() == [round(i * 30 / 24) for i in range(48)]
    assert at_frame_rate(frames[:10], 12.0).shape[0] == 20
    assert at_frame_rate(frames, 23.976) is frames


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_same_video(output):
    frames = make(output, "a red circle", "--num-frames", 21)
    assert np.array_equal(make(output, "a red circle", "--num-frames", 21, "--stream"), frames)


def test_an_endless_stream_is_directed_by_typed_lines(output, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.write(writer, b"a blue square\n/cut a green star\n/zoom\n\n/quit\n")
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        frames = make(output, "a red circle", "--stream")
        os.close(writer)
    out, err = capsys.readouterr()
    prompts = re.findall(r"chunk \d+, shot (\d+): .* '(.*)'", out)
    assert list(dict.fromkeys(prompts)) == [("0", "a red circle"), ("0", "a blue square"), ("1", "a green star")]
    assert "'/zoom' is not a command" in err and "/quit" in out
    assert len(frames) == 8 * len(prompts) - 3
    assert re.search(rf"frames: +{len(frames)} ", out)


def test_ctrl_c_ends_a_stream_with_a_file_that_plays(output):
    command = [sys.executable, "-m", "longlive_diffusers.cli", "generate", "a red circle", "--stream"]
    process = subprocess.Popen(
        [*command, "--output", str(output), "--no-progress"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has the signal ignored, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("chunk 2,"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    written = int(re.search(r"frames: +(\d+) ", out)[1])
    assert written >= 21
    assert abs(len(read_video(output)[0]) - written) <= 1  # it may be hit between writing a frame and counting it


def test_an_interruption_elsewhere_is_told(monkeypatch, output, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PipelineFolder, "load", interrupt)
    assert main(["generate", "x", "--output", str(output)]) == 130
    assert capsys.readouterr().err == "longlive: interrupted\n"
    assert not output.exists()


# -- models ----------------------------------------------------------------------------------------------------------


def test_auto_is_the_stored_dtype_on_a_cpu_but_float32_for_float16(tmp_path, monkeypatch, output):
    assert stored_dtype(toy_pipeline_path() / "transformer") == torch.float16
    DiffusionPipeline.from_pretrained(toy_pipeline_path(), dtype=torch.float16).save_pretrained(tmp_path / "float16")
    assert stored_dtype(tmp_path / "float16" / "transformer") == torch.float16
    loaded = PipelineFolder.find(tmp_path / "float16").load(device=torch.device("cpu"))
    assert loaded.transformer.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.float32
    pipe = DiffusionPipeline.from_pretrained(toy_pipeline_path(), dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "half")
    assert stored_dtype(tmp_path / "half" / "transformer") == torch.bfloat16  # though its norms are in float32
    assert stored_dtype(tmp_path) == torch.float32
    loaded = PipelineFolder.find(tmp_path / "half").load(device=torch.device("cpu"))
    assert loaded.transformer.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.bfloat16
    loaded = PipelineFolder.find(tmp_path / "half").load(device=torch.device("cpu"), dtype="float32")
    assert loaded.transformer.dtype == torch.float32


GENERATE = """
import sys
sys.path.insert(0, sys.argv[1])
import longlive_diffusers
from diffusers import DiffusionPipeline
from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.cli import main
DiffusionPipeline.from_pretrained(toy_pipeline_path()).push_to_hub("someone/toy")
arguments = ["generate", "a red circle", "--num-frames", "13", "--seed", "0", "--output", "video.mp4"]
assert main([*arguments, "--model", "someone/toy"]) == 0
assert main([*arguments, "--model", "someone/else"]) == 2
"""


def test_a_model_of_the_hub(hub: "Hub", output):
    report = hub.run_python(GENERATE, str(ROOT))
    assert re.search(r"frames: +13 ", report)
    expected = make(output, "a red circle", "--num-frames", 13)
    assert np.array_equal(read_video(hub.folder / "video.mp4")[0] / 255, expected)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either prompts or a --shots-file"),
        (["x", "--shots-file", "shots.txt"], "give either prompts or a --shots-file, not both"),
        (["--shots-file", "missing.txt"], "there is no shots file 'missing.txt'"),
        (["--shots-file", "shots.txt"], "'shots.txt', line 1: a shot lasts"),
        (["x", "--image", "a.png", "--video", "b.mp4"], "either --image or --video, not both"),
        (["x", "--image", "missing.png"], "the image 'missing.png' does not exist"),
        (["x", "--image", "shots.txt"], "'shots.txt' cannot be read as an image"),
        (["x", "--video", "missing.mp4"], "the video 'missing.mp4' does not exist"),
        (["x", "--video", "short.mp4"], "the video to continue has 4 frames; at least 5 are needed"),
        (["x", "--video", "long.mp4", "--num-frames", "13"], "13 frames leave nothing to add to the 13"),
        (["x", "--output", "video.avi"], "its suffix is '.avi'"),
        (["x", "--output", "missing/video.mp4"], "the folder 'missing' does not exist"),
        (["x", "--height", "100"], "`height` must be a positive multiple of 16, got 100"),
        (["x", "--window-size", "4"], "`window_size` 4 is too small"),
        (["x", "--sink-size", "3"], "`sink_size` must be a multiple of `chunk_size` (2), got 3"),
        (["x", "--negative-prompt", "y"], "--negative-prompt does nothing with a --guidance-scale of 1"),
        (
            ["x", "--negative-prompt", "y", "--guidance-scale", 0],
            "--negative-prompt does nothing with a --guidance-scale of 0",
        ),
        (["x", "--device", "cpu", "--offload", "model"], "this runs on the CPU"),
        (["x", "y", "--stream"], "an endless video of 2 shots needs a --shots-file"),
        (["x", "--lora", "missing.pt"], "There is no LoRA file 'missing.pt'"),
        (["x", "--lora", "shots.txt"], "shots.txt (7 bytes) is not a checkpoint"),
        (["x", "--model", "."], "'.' is not a pipeline: it has no model_index.json"),
        (["x", "--model", str(toy_pipeline_path() / "transformer")], "it has no model_index.json"),
        (["x", "--model", "other"], "'other' is a FluxPipeline, not a LongLivePipeline"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_model_is_loaded(tmp_path, monkeypatch, capsys, arguments, message):
    def must_not_load(*args, **kwargs):
        raise AssertionError("models were loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PipelineFolder, "load", must_not_load)
    Path("shots.txt").write_text("[x] one")
    for name, frames in (("short.mp4", 4), ("long.mp4", 13)):
        with VideoWriter(name) as writer:
            writer.write(np.zeros((frames, 32, 32, 3)))
    Path("other/transformer").mkdir(parents=True)
    Path("other/vae").mkdir()
    Path("other/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    Path("other/transformer/config.json").write_text("{}")
    Path("other/vae/config.json").write_text("{}")
    files = set(Path().iterdir())

    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("longlive: error: ") and message in line
    assert set(Path().iterdir()) == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "0 is not above 0"),
        (["--seconds", "nan"], "nan is not a finite number"),
        (["--num-frames", "-3"], "-3 is not a finite number of at least 1"),
        (["--steps", "2.5"], "'2.5' is not an integer"),
        (["--guidance-scale", "-1"], "-1 is not a finite number of at least 0"),
        (["--seconds", "1", "--num-frames", "5"], "not allowed with argument"),
        (["--device", "abacus"], "'abacus' is not a device"),
        (["--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_malformed_options_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "x", *arguments])
    assert message in capsys.readouterr().err


def test_help_describes_the_shots_file(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    assert generate.FORMAT.strip() in capsys.readouterr().out
