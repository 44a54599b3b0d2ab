"""`longlive convert`: an original checkpoint in, a folder that opens and makes video out."""

import signal
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.cli import main
from longlive_diffusers.video.reader import read_video
from tests.support.processes import ForkedProcess, environment
from tests.support.toy_checkpoints import save_original_checkpoint, save_original_lora


BASE = str(toy_pipeline_path())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original") / "model.pt"
    save_original_checkpoint(path)
    return path


def open_transformer(folder: Path, **options) -> LongLiveTransformer3DModel:
    return LongLiveTransformer3DModel.from_pretrained(folder, subfolder="transformer", **options)


def test_the_folder_holds_the_checkpoint_and_makes_video(tmp_path, checkpoint, capsys):
    expected = save_original_checkpoint(tmp_path / "same.pt")
    folder = tmp_path / "pipeline"
    command = ["convert", str(checkpoint), "--base", BASE, "--output", str(folder), "--dtype", "float32"]
    assert main(command) == 0
    report = capsys.readouterr().out
    assert "transformer: " in report and str(folder) in report

    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is LongLivePipeline
    weights = pipe.transformer.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    base = DiffusionPipeline.from_pretrained(BASE)
    assert pipe.config.window_size == base.config.window_size
    assert pipe.transformer.config.chunk_size == base.transformer.config.chunk_size

    video = tmp_path / "video.mp4"
    assert (
        main(["generate", "a red circle", "--model", str(folder), "--num-frames", "13", "--output", str(video)]) == 0
    )
    assert len(read_video(video)[0]) == 13


def test_dtype_and_lora(tmp_path, checkpoint):
    lora = save_original_lora(tmp_path / "lora.pt")
    for name, options in {"plain": [], "fused": ["--lora", str(lora)]}.items():
        assert main(["convert", str(checkpoint), "--base", BASE, "--output", str(tmp_path / name), *options]) == 0
    plain, fused = (open_transformer(tmp_path / name, dtype=torch.bfloat16) for name in ("plain", "fused"))
    assert plain.dtype == fused.dtype == torch.bfloat16
    assert not torch.equal(plain.blocks[0].attn1.to_q.weight, fused.blocks[0].attn1.to_q.weight)
    assert torch.equal(plain.blocks[0].attn1.to_k.weight, fused.blocks[0].attn1.to_k.weight)


def test_ema_is_taken_on_request(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["generator_ema"] = {name: weight + 1 for name, weight in content["generator"].items()}
    torch.save(content, tmp_path / "both.pt")
    for name, options in {"plain": [], "ema": ["--use-ema"]}.items():
        command = ["convert", str(tmp_path / "both.pt"), "--base", BASE, "--output", str(tmp_path / name)]
        assert main([*command, "--dtype", "float32", *options]) == 0
    plain, ema = (open_transformer(tmp_path / name) for name in ("plain", "ema"))
    torch.testing.assert_close(ema.proj_out.weight, plain.proj_out.weight + 1)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"checkpoint": "missing.pt"}, "There is no checkpoint file missing.pt"),
        ({"checkpoint": "empty.pt"}, "empty.pt (0 bytes) is not a checkpoint: it is empty"),
        ({"--base": "full"}, "'full' is not a pipeline: it has no model_index.json"),
        ({"--output": "full"}, "The output full already holds 1 files or folders"),
        ({"--lora": "missing.pt"}, "There is no LoRA file 'missing.pt'"),
        ({"--lora": "empty.pt"}, "empty.pt (0 bytes)"),
        ({"--lora": "full"}, "The LoRA 'full' has no weight file; it has file"),
        ({"--lora": "nope"}, "The LoRA 'nope' is no file, no folder, and no Hub repository that can be reached"),
        ({"--output": "empty.pt/new"}, "empty.pt is not a folder"),
        ({"--output": ""}, "The output '' is no name"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, monkeypatch, capsys, checkpoint, replaced, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.pt").touch()
    Path("full").mkdir()
    Path("full/file").touch()
    options = {"--base": BASE, "--output": "new", **replaced}
    first = options.pop("checkpoint", str(checkpoint))
    assert main(["convert", first, *(text for option in options.items() for text in option)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("longlive: error: ") and message in line
    assert not Path("new").exists()


def test_the_card_says_where_the_parts_come_from(tmp_path, checkpoint):
    assert main(["convert", str(checkpoint), "--base", BASE, "--output", str(tmp_path / "mine")]) == 0
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert "# mine\n" in card.content and ".partial" not in card.content
    section = card.content.split("## License")[1]
    assert "The transformer was converted from `model.pt`, whose license it keeps." in section
    assert "come from a base, whose license is `apache-2.0`" in section
    assert card.data.license is None  # the transformer has a license of its own
    assert str(tmp_path) not in card.content and BASE not in card.content


SLOW = """
import sys, time
from longlive_diffusers import LongLivePipeline
from longlive_diffusers.cli import main

def save_slowly(self, folder, **options):
    with open(f"{folder}/half.safetensors", "wb") as file:
        file.write(bytes(10))
    print("writing", flush=True)
    time.sleep(60)

LongLivePipeline.save_pretrained = save_slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_told_to_end_it_removes_what_it_had_written(tmp_path, checkpoint, command):
    source = [str(checkpoint), "--base", BASE] if command == "convert" else [BASE]
    words = ["-c", SLOW, command, *source, "--output", tmp_path / "out"]
    process = ForkedProcess(words, environment())
    next(line for line in process.lines() if line == "writing")
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert process.errors.splitlines()[-1] == "longlive: ended by SIGTERM; what was half-written is removed"
    assert "Traceback" not in process.errors
    assert list(tmp_path.iterdir()) == []


def test_handlers_of_signals_are_those_of_before():
    before = signal.getsignal(signal.SIGTERM)
    assert main(["convert", "missing.pt", "--base", BASE, "--output", "nowhere"]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
