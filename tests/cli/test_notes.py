"""What the command line says beside the result: warnings and notes, a line each."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from longlive_diffusers.cli import main
from longlive_diffusers.cli.backends import notes_on_speed
from longlive_diffusers.cli.console import warnings_in_one_line
from longlive_diffusers.conversion.pipeline_folder import PipelineFolder
from tests.support.toy_checkpoints import save_original_lora


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "nvfp4", "parts"),
    [
        (CPU, "auto", None, []),
        (CPU, "bfloat16", "w4a16", []),
        (GPU, "float16", "fp8", []),
        (CPU, "float16", None, ["--dtype float16 is slow on a CPU"]),
        (CPU, "auto", "fp8", ["--nvfp4 fp8 is emulated on a CPU"]),
        (CPU, "auto", "emulate", ["--nvfp4 emulate is emulated on a CPU"]),
        (CPU, "float16", "auto", ["--dtype float16", "--nvfp4 auto"]),
    ],
)
def test_what_is_slow_is_said(device, dtype, nvfp4, parts):
    notes = notes_on_speed(device, dtype, nvfp4)
    assert len(notes) == len(parts) and all(note.startswith(part) for note, part in zip(notes, parts, strict=True))


def test_warnings_are_a_line_each_and_come_once(capsys):
    shown_before = warnings.showwarning
    with warnings_in_one_line():
        warnings.simplefilter("always")
        for text in ("one\n  and the same", "one and\nthe same", "another"):
            warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err == "longlive: warning: one and the same\nlonglive: warning: another\n"
    assert warnings.showwarning is shown_before


def test_float16_and_two_loras_are_no_reason_for_others_warnings(tmp_path, capsys, recwarn):
    lora = str(save_original_lora(tmp_path / "lora.pt"))
    options = ["--num-frames", "5", "--steps", "1", "--dtype", "float16", "--lora", lora, "--lora", lora]
    assert main(["generate", "x", *options, "--output", str(tmp_path / "video.mp4")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "longlive: --dtype float16 is slow on a CPU; float32 and bfloat16 are faster there"


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes with a name")
def test_waiting_for_the_reader_of_a_pipe_is_said(tmp_path, capsys, monkeypatch):
    def load(self, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(PipelineFolder, "load", load)
    pipe = Path(tmp_path / "pipe.mp4")
    os.mkfifo(pipe)
    assert main(["generate", "x", "--no-lora", "--output", str(pipe)]) == 130
    note, _ = capsys.readouterr().err.splitlines()
    assert note == f"longlive: '{pipe}' is a pipe: nothing can be written before somebody reads it"
