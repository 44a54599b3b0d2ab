"""`longlive generate` on the embedded toy: the file plays, is what was asked for, and errors are one line, at once."""

import itertools
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.cli import generate, main, run_generate
from longlive_diffusers.cli.run_generate import Progress
from longlive_diffusers.conversion.pipeline_folder import PipelineFolder, stored_dtype, use_nvfp4
from longlive_diffusers.models.transformer_longlive import LongLiveTransformer3DModel
from longlive_diffusers.nvfp4.linear import nvfp4_layers
from longlive_diffusers.video.reader import read_video
from longlive_diffusers.video.writer import VideoWriter
from tests.support.paths import ROOT
from tests.support.processes import ForkedProcess, environment
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


def make(output: Path, *arguments: object, seed: int = 0, embedded_lora: bool = False) -> np.ndarray:
    """Run the command; the frames of the file, in [0, 1]."""
    command = ["generate", *map(str, arguments), "--output", str(output), "--seed", str(seed), "--no-progress"]
    assert main(command if embedded_lora or "--lora" in arguments else [*command, "--no-lora"]) == 0
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
    stalls = r"(no stall|\d stalls?, \d+\.\d\d s in all)"
    assert re.search(rf"watched meanwhile: +{stalls} \(\d+\.\d\d s of video were made in a second", report)
    assert re.search(r"peak memory: +\d+\.\d+ [MG]iB \(resident", report)
    assert str(output) in report


def test_the_default_is_about_five_seconds(output):
    assert 5 <= len(make(output, "a red circle", "--steps", 1)) / 24 < 5.5


def test_seconds_are_rounded_up_to_whole_chunks(output):
    assert len(make(output, "a red circle", "--seconds", 0.6)) == 21  # 3 chunks; 2 are 13 frames


def test_options_reach_the_pipeline(output):
    short = ["a red circle", "--num-frames", 5, "--steps", 2]
    plain = make(output, *short)
    assert make(output, *short, "--height", 32, "--width", 48).shape == (5, 32, 48, 3)
    for options in (
        ["--steps", 1],
        ["--guidance-scale", 3, "--negative-prompt", "blue"],
        ["--dtype", "bfloat16"],
    ):
        assert difference(make(output, *short, *options), plain) > 1e-4
    # These matter once the window is full.
    long = ["a red circle", "--num-frames", 37, "--steps", 1, "--height", 32, "--width", 32]
    plain = make(output, *long, "--window-size", 6, "--sink-size", 2)
    for options in (["--window-size", 8, "--sink-size", 2], ["--window-size", 6, "--sink-size", 0]):
        assert difference(make(output, *long, *options), plain) > 1e-4
    rope = ["--window-size", 6, "--sink-size", 2, "--relative-rope"]
    assert difference(make(output, *long, *rope), plain) > 1e-4


def test_a_lora_changes_the_video(output, tmp_path, capsys):
    lora = save_original_lora(tmp_path / "lora.pt")
    options = ["a red circle", "--num-frames", 13, "--steps", 2]
    plain = make(output, *options)
    whole = make(output, *options, "--lora", lora)
    assert difference(whole, plain) > 1e-3
    assert difference(make(output, *options, "--lora", lora, "--lora-scale", 0), plain) < 1e-4
    two = ["--lora", lora, "--lora", lora, "--lora-scale", 0.25, "--lora-scale", 0.75]
    assert difference(make(output, *options, *two), whole) < difference(whole, plain) / 20  # H.264 rounds
    misfit = save_original_lora(tmp_path / "misfit.pt", width=96)
    assert main(["generate", "x", "--lora", str(misfit), "--output", str(output)]) == 2
    assert "The LoRA is for another model" in capsys.readouterr().err


def test_backends_and_compilation_reach_the_transformer(output, monkeypatch):
    asked = []
    monkeypatch.setattr(
        LongLiveTransformer3DModel, "compile_repeated_blocks", lambda self, **options: asked.append(options)
    )
    monkeypatch.setattr(LongLiveTransformer3DModel, "set_attention_backend", lambda self, name: asked.append(name))
    monkeypatch.setattr(
        "longlive_diffusers.conversion.pipeline_folder.quantize_model",
        lambda model, config: asked.append((type(model), config.backend)),
    )
    options = ["--attention-backend", "_native_math", "--nvfp4", "w4a16", "--compile"]
    make(output, "a red circle", "--num-frames", 5, "--steps", 1, *options)
    assert asked == [(LongLiveTransformer3DModel, "w4a16"), "_native_math", {"fullgraph": True}]


def test_a_speed_changes_the_models_and_says_so(output, tmp_path, capsys):
    options = ["a red circle", "--num-frames", 5, "--steps", 1]
    plain = make(output, *options)
    assert "Speed" not in capsys.readouterr().err
    exact = make(output, *options, "--speed", "exact")
    assert "longlive: Speed 'exact' on 'cpu':\n- " in capsys.readouterr().err
    # Rounding moves a few pixels to the next level on some CPUs, and H.264 spreads that over their blocks; the numbers
    # are compared before that in tests/pipelines/test_speed.py.
    assert difference(exact, plain) < 1 / 255 / 4

    lora = save_original_lora(tmp_path / "lora.pt")  # which is added to the weights, for bfloat16 to be
    fast = make(output, *options, "--lora", lora, "--speed", "fast")
    assert "Speed 'fast' on 'cpu'" in capsys.readouterr().err
    assert difference(fast, make(output, *options, "--lora", lora)) < 0.02
    assert main(["generate", "x", "--speed", "fast", "--nvfp4", "--lora", str(lora), "--output", str(output)]) == 2
    assert "--speed fast adds the LoRA to the weights, and those in NVFP4 would be rounded" in capsys.readouterr().err


def test_a_pipeline_in_four_bits_keeps_its_weights_and_changes_its_backend():
    pipe = PipelineFolder.find(toy_pipeline_path()).load(device=torch.device("cpu"), nvfp4_backend="emulate")
    layers = nvfp4_layers(pipe.transformer)
    codes = {name: layer.weight_codes for name, layer in layers.items()}
    assert {layer.backend.name for layer in layers.values()} == {"emulate"}
    use_nvfp4(pipe, "w4a16")
    assert {layer.backend.name for layer in layers.values()} == {"w4a16"}
    assert all(layer.weight_codes is codes[name] for name, layer in nvfp4_layers(pipe.transformer).items())


def test_memory_that_is_not_there_is_one_line(output, monkeypatch, capsys):
    """A cache of 12 TB, on a CPU; and what a GPU says."""
    command = ["generate", "x", "--no-lora", "--output", str(output), "--num-frames", "100000"]
    assert main([*command, "--window-size", "100000", "--height", "4096", "--width", "4096"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("longlive: error: The KV cache of 1 x 25002 latent frames of 512x512, with prompts of 32 ")
    assert "GiB are available. What takes less memory: a smaller --window-size, --height and --width, " in line
    assert not output.exists()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB.")

    monkeypatch.setattr(PipelineFolder, "load", fail)
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--kv-cache-dtype fp8 or nvfp4, --nvfp4 auto, --offload model (CUDA out of memory)" in line


@pytest.mark.parametrize(
    ("is_terminal", "options", "shown"), [(True, [], True), (False, [], False), (True, ["--no-progress"], False)]
)
def test_bars_are_for_terminals(output, monkeypatch, is_terminal, options, shown):
    asked = []

    def load(self, *, show_progress, **options):
        asked.append(show_progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(PipelineFolder, "load", load)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert main(["generate", "x", "--output", str(output), *options]) == 130
    assert asked == [shown]


def test_a_bug_is_shown_whole(output, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(PipelineFolder, "load", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        main(["generate", "x", "--output", str(output)])


# -- shots, images, videos -------------------------------------------------------------------------------------------


def test_several_prompts_are_shots(output, capsys):
    make(output, "a red circle", "a blue square", "--num-frames", 29, "--stream")
    out = capsys.readouterr().out
    assert re.findall(r"^chunk (\d+), shot (\d+): .* s of video", out, re.M) == [
        ("0", "0"),
        ("1", "0"),
        ("2", "1"),
        ("3", "1"),
    ]
    assert re.findall(r"^'(.*)'\nchunk (\d+)", out, re.M) == [("a red circle", "0"), ("a blue square", "2")]


def test_a_shots_file_says_how_long_shots_last(output, tmp_path, capsys):
    path = tmp_path / "shots.txt"
    path.write_text("[1] a red circle\n[2] a blue square\n")
    assert len(make(output, "--shots-file", path)) == 21
    assert len(make(output, "--shots-file", path, "--seconds", 1.2, "--stream")) == 29  # the last shot goes on
    shots = re.findall(r"^chunk \d+, shot (\d+)", capsys.readouterr().out, re.M)
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


def test_frames_that_are_continued_are_not_counted_as_made(output, tmp_path, capsys, monkeypatch):
    """By a clock that moves on by a second with every chunk: of four, two are continued."""
    make(tmp_path / "first.mp4", "a red circle", "--num-frames", 13)
    assert "video were made in a second, after the first chunk)" in capsys.readouterr().out
    clock = itertools.count(100.0)
    monkeypatch.setattr(run_generate, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(run_generate, "Progress", lambda *args: Progress(*args, began=next(clock)))
    options = ["--video", tmp_path / "first.mp4", "--num-frames", 29, "--steps", 1, "--stream"]
    make(output, "a blue square", *options, "--split-first-chunk")  # which is no new one
    report = capsys.readouterr().out
    parts = re.findall(r"^chunk (\d+), .* (\S+ s) of video after (\S+) s \((.*)\)$", report, re.M)
    assert parts == [
        ("0", "0.0 s", "1.0", "continued"),
        ("0", "0.2 s", "2.0", "continued"),
        ("1", "0.5 s", "3.0", "continued"),
        ("2", "0.9 s", "4.0", "2.0 new frames/s"),
        ("3", "1.2 s", "5.0", "3.2 new frames/s"),
    ]
    assert "frames:              29, 13 of them continued (4 chunks)\n" in report
    told = (
        "of the new ones: to encode the inputs, write what is continued, denoise the first new chunk, decode and write"
    )
    assert f"time to first frame: 4.00 s ({told} it; after " in report
    assert "frames per second:   3.20 (new frames; " in report
    assert "0.33 s of video were made in a second, after the first new chunk)\n" in report


def test_an_interruption_before_anything_new_tells_no_speed(output, tmp_path, capsys, monkeypatch):
    make(tmp_path / "first.mp4", "a red circle", "--num-frames", 13)
    capsys.readouterr()
    interrupt_after_the_first_chunk(monkeypatch)
    assert main([*COMMAND, str(output), "--video", str(tmp_path / "first.mp4"), "--num-frames", "29"]) == 130
    report = capsys.readouterr().out
    assert "frames:              5, 5 of them continued (1 chunk)\n" in report
    assert f"output:              {output}\n" in report
    assert "frames per second: " not in report and "time to first frame" not in report


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
    prompts = re.findall(r"^'(.*)'\nchunk \d+, shot (\d+)", out, re.M)
    assert prompts == [("a red circle", "0"), ("a blue square", "0"), ("a green star", "1")]
    chunks = re.findall(r"^chunk (\d+),", out, re.M)
    assert "'/zoom' is not a command" in err and "/quit" in out
    assert len(frames) == 8 * len(chunks) - 3
    assert re.search(rf"frames: +{len(frames)} ", out)


def test_ctrl_c_ends_a_stream_with_a_file_that_plays(output):
    command = ["longlive_diffusers.cli", "generate", "a red circle", "--stream", "--output", str(output)]
    process = ForkedProcess(["-m", *command, "--no-progress"], environment())
    next(line for line in process.lines() if line.startswith("chunk 2,"))
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert "Traceback" not in process.errors
    written = int(re.search(r"frames: +(\d+) ", process.printed)[1])
    assert written >= 21
    assert abs(len(read_video(output)[0]) - written) <= 1  # it may be hit between writing a frame and counting it


@pytest.fixture
def ctrl_c_after_the_first_chunk(monkeypatch) -> None:
    interrupt_after_the_first_chunk(monkeypatch)


def interrupt_after_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Progress.add

    def add_and_interrupt(progress: Progress, num_frames: int) -> None:
        add(progress, num_frames)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "add", add_and_interrupt)


COMMAND = ["generate", "a red circle", "--steps", "1", "--no-lora", "--seed", "0", "--output"]


@pytest.mark.usefixtures("ctrl_c_after_the_first_chunk")
@pytest.mark.parametrize("there_before", [False, True])
def test_an_interrupted_video_replaces_nothing(output, capsys, there_before):
    if there_before:
        output.write_bytes(b"old")
    assert main([*COMMAND, str(output), "--num-frames", "21"]) == 130
    written = output.with_name("out.unfinished.mp4") if there_before else output
    assert len(read_video(written)[0]) == 5
    report = capsys.readouterr().out
    assert "interrupted:         after 5 frames of the 21 that were asked for\n" in report
    assert "frames:              5 (1 chunk)\n" in report
    if there_before:
        assert output.read_bytes() == b"old"
        assert f"output:              {written} (unfinished; '{output}' is what it was)\n" in report


@pytest.mark.parametrize(
    ("ending", "name"), [(None, "out-2.mp4"), (KeyboardInterrupt(), "out.unfinished.mp4")], ids=["finished", "not"]
)
@pytest.mark.parametrize("there_before", [False, True])
def test_what_another_program_writes_meanwhile_is_kept_and_told(
    output, capsys, monkeypatch, there_before, ending, name
):
    add = Progress.add

    def add_and_let_another_program_write(progress: Progress, num_frames: int) -> None:
        add(progress, num_frames)
        output.unlink()
        output.write_bytes(b"another program's")
        if ending is not None:
            raise ending

    monkeypatch.setattr(Progress, "add", add_and_let_another_program_write)
    if there_before:
        output.write_bytes(b"old")
    assert main([*COMMAND, str(output), "--num-frames", "21"]) == (0 if ending is None else 130)
    assert output.read_bytes() == b"another program's"
    written = output.with_name(name)
    assert len(read_video(written)[0]) == (21 if ending is None else 5)
    told = f"output:              {written} ('{output}' was written by another program meanwhile)\n"
    assert told in capsys.readouterr().out
    assert len(list(output.parent.iterdir())) == 2


@pytest.mark.parametrize(("moved", "told"), [(True, " (moved away from there by another program)"), (False, "")])
def test_where_a_file_is_that_was_moved_or_removed(output, capsys, monkeypatch, moved, told):
    add = Progress.add

    def add_and_move(progress: Progress, num_frames: int) -> None:
        add(progress, num_frames)
        if progress.chunks == 1:
            output.rename(output.with_name("mine.mp4")) if moved else output.unlink()

    monkeypatch.setattr(Progress, "add", add_and_move)
    assert main([*COMMAND, str(output), "--num-frames", "21"]) == 0
    assert f"output:              {output}{told}\n" in capsys.readouterr().out
    (file,) = output.parent.iterdir()
    assert file.name == ("mine.mp4" if moved else "out.mp4") and len(read_video(file)[0]) == 21


@pytest.mark.usefixtures("ctrl_c_after_the_first_chunk")
def test_an_endless_video_is_finished_by_ctrl_c(output, capsys, monkeypatch):
    output.write_bytes(b"old")
    monkeypatch.setattr(sys, "stdin", None)
    assert main([*COMMAND, str(output), "--stream"]) == 130
    assert len(read_video(output)[0]) == 5
    report = capsys.readouterr().out
    assert "interrupted:         after 5 frames\n" in report
    assert f"output:              {output} (in place of the file that was there)\n" in report


def test_what_was_made_before_an_error_is_kept_and_told(output, capsys, monkeypatch):
    add = Progress.add

    def add_and_fail(progress: Progress, num_frames: int) -> None:
        add(progress, num_frames)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Progress, "add", add_and_fail)
    output.write_bytes(b"old")
    assert main([*COMMAND, str(output), "--num-frames", "21"]) == 1
    out, err = capsys.readouterr()
    unfinished = output.with_name("out.unfinished.mp4")
    assert f"output:              {unfinished} (unfinished; '{output}' is what it was)\n" in out
    assert err.splitlines()[-1].startswith("longlive: error: out of memory; ")
    assert output.read_bytes() == b"old" and len(read_video(unfinished)[0]) == 5


def test_an_interruption_elsewhere_is_told(monkeypatch, output, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PipelineFolder, "load", interrupt)
    assert main(["generate", "x", "--no-lora", "--output", str(output)]) == 130
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
        (
            ["x", "--video", "long.mp4", "--num-frames", "1"],
            "1 frame would leave nothing to add",
        ),
        (
            ["x", "--video", "long.mp4", "--num-frames", "13"],
            "13 frames would leave nothing to add",
        ),
        (["x", "--output", "video.avi"], "its suffix is '.avi'"),
        (["x", "--output", "missing/video.mp4"], "the folder 'missing' does not exist"),
        (["x", "--output", "here.mp4", "--video", "long.mp4"], "--output 'here.mp4' is the file of --video"),
        (["x", "--output", "long.mp4", "--video", "./here.mp4"], "--output 'long.mp4' is the file of --video"),
        (["x", "--output", "~/here.mp4", "--video=~/long.mp4"], "--output '~/here.mp4' is the file of --video"),
        (["--output", "also.mp4", "--shots-file", "shots.txt"], "--output 'also.mp4' is the file of --shots-file"),
        (["x", "--output", "also.mp4", "--image", "shots.txt"], "--output 'also.mp4' is the file of --image"),
        (["x", "--height", "100"], "--height must be an integer, a multiple of 16 from 16 to 16384, got 100"),
        (["x", "--window-size", "4"], "--window-size 4 is too small"),
        (["x", "--sink-size", "3"], "--sink-size must be a multiple of `chunk_size` (2), got 3"),
        (["x", "--negative-prompt", "y"], "--negative-prompt does nothing with a --guidance-scale of 1"),
        (
            ["x", "--negative-prompt", "y", "--guidance-scale", 0],
            "--negative-prompt does nothing with a --guidance-scale of 0",
        ),
        (["x", "--device", "cpu", "--offload", "model"], "this runs on the CPU"),
        (["x", "y", "--stream"], "an endless video of 2 shots needs a --shots-file"),
        (["x", "--device", "meta"], "there is no device 'meta' here, only cpu"),
        (["x", "--device", "cpu:1"], "there is no device 'cpu:1' here, only cpu"),
        (["x", "--device", "abacus"], "--device 'abacus' is not a device; here, it is cpu"),
        (["x", "--attention-backend", "abacus"], "no attention backend 'abacus': there are "),
        (["x", "--attention-backend", "sage"], "sage cannot be used: Sage Attention backend 'sage' is not usable"),
        (["x", "--attention-backend", "_native_cudnn"], "needs a GPU; on a CPU, there are native, "),
        (["x", "--nvfp4", "te"], "--nvfp4 te needs TransformerEngine"),
        (["x", "--nvfp4", "scaled_mm"], "--nvfp4 scaled_mm needs a GPU of compute capability 10.0"),
        (["x", "--lora-scale", "2"], "--lora-scale needs a --lora"),
        (["x", "--lora", "a.pt", "--no-lora"], "give either --lora or --no-lora, not both"),
        (
            ["x", *["--lora", "a.pt"] * 3, *["--lora-scale", 1] * 2],
            "there are 2 --lora-scale for 3 --lora; give one for all, or one for each",
        ),
        (["x", "--lora", "missing.pt"], "There is no LoRA file 'missing.pt'"),
        (["x", "--lora", "~nobody/a.pt"], "There is no LoRA file '~nobody/a.pt'"),
        (["x", "--lora", "shots.txt"], "shots.txt (7 bytes) is not a checkpoint"),
        (["x", "--model", "."], "'.' is not a pipeline: it has no model_index.json"),
        (["x", "--model", str(toy_pipeline_path() / "transformer")], "it has no model_index.json"),
        (["x", "--model", "~nobody/model"], "'~nobody/model' is no folder, and no Hub repository"),
        (["x", "--model", "other"], "'other' is a FluxPipeline, not a LongLivePipeline"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_model_is_loaded(tmp_path, monkeypatch, capsys, arguments, message):
    def must_not_load(*args, **kwargs):
        raise AssertionError("models were loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(PipelineFolder, "load", must_not_load)
    Path("shots.txt").write_text("[x] one")
    for name, frames in (("short.mp4", 4), ("long.mp4", 13)):
        with VideoWriter(name) as writer:
            writer.write(np.zeros((frames, 32, 32, 3)))
    Path("here.mp4").symlink_to("long.mp4")
    Path("also.mp4").hardlink_to("shots.txt")
    Path("other/transformer").mkdir(parents=True)
    Path("other/vae").mkdir()
    Path("other/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    Path("other/transformer/config.json").write_text("{}")
    Path("other/vae/config.json").write_text("{}")
    files = set(Path().iterdir())

    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("longlive: error: ") and message in line
    assert set(Path().iterdir()) == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds: must be a number above 0 and at most 1000000, not '0'"),
        (["--seconds", "nan"], "--seconds: must be a number above 0 and at most 1000000, not 'nan'"),
        (["--num-frames", "-3"], "--num-frames: must be an integer from 1 to 24000000, not '-3'"),
        (["--steps", "2.5"], "--steps: must be an integer from 1 to 1000, not '2.5'"),
        (["--steps", "9" * 5000], f"not '{'9' * 60}...'"),
        (["--guidance-scale", "-1"], "--guidance-scale: must be a number from 0 to 1000, not '-1'"),
        (["--guidance-scale", "inf"], "--guidance-scale: must be a number from 0 to 1000, not 'inf'"),
        (["--height", "16385"], "--height: must be an integer from 1 to 16384, not '16385'"),
        (["--seed", str(2**64)], f"--seed: must be an integer from 0 to {2**64 - 1}, not '{2**64}'"),
        (["--lora-scale", "1e9"], "--lora-scale: must be a number from -100 to 100, not '1e9'"),
        (["--nvfp4", "abacus"], "invalid choice: 'abacus'"),
        (["a \udcff prompt"], "PROMPT: is not UTF-8 text: 'a \\udcff prompt'"),
        (["--negative-prompt", "\udcff"], "--negative-prompt: is not UTF-8 text"),
        (["--seconds", "1", "--num-frames", "5"], "not allowed with argument"),
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
