"""What the toy's scripts cannot do is one line, before any work, and nothing on the disk is touched."""

import sys
from pathlib import Path

import pytest

import animate
import assemble
import evaluate
import one_line
import store_lora
import train_decoder
import train_text
import train_vae
import world
from longlive_diffusers.assets import toy_decoder_path, toy_lora_path, toy_pipeline_path
from tests.support.paths import ROOT


TOY, DECODER, LORA = toy_pipeline_path(), toy_decoder_path(), toy_lora_path(4).parent
TOY_SCRIPTS = (ROOT / "training" / "toy").glob("*.py")
PARTS = ["--text", TOY, "--vae", TOY / "vae"]


def told_by(script, monkeypatch, capsys, words) -> str:
    """The line that a script of this command line ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    try:
        status = one_line.run(script.main)
    except SystemExit as error:  # argparse's, which shows the options first
        status = error.code
    assert status == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{script.__name__}.py: error: ")
    return line


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (store_lora, ["--trained", LORA, "--output", "mine"]),
        (store_lora, ["--trained", "mine/run", "--output", "mine/run"]),
        (store_lora, ["--trained", "mine/run", "--output", "mine"]),
        (assemble, [*PARTS, "--output", "mine"]),
        (train_decoder, ["--output", "mine"]),
        (train_text, ["--output", "mine"]),
        (train_vae, ["--output", "mine"]),
        (store_lora, ["--trained", LORA, "--output", "mine/notes.txt"]),
        (assemble, [*PARTS, "--output", "mine/notes.txt"]),
        (train_decoder, ["--output", "mine/notes.txt/decoder"]),
        (train_text, ["--output", "mine/notes.txt"]),
        (train_vae, ["--output", "mine/notes.txt/vae"]),
        (evaluate, ["--model", TOY, "--output", "mine/notes.txt"]),
        (world, ["--output", "mine/notes.txt"]),
        (animate, ["--output", "missing/toy.webp"]),
        (animate, ["--output", "mine"]),
    ],
)
def test_nothing_else_is_replaced(script, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "mine" / "run"
    run.mkdir(parents=True)
    (run.parent / "notes.txt").write_text("mine")
    (run / store_lora.LORA).write_bytes((LORA / store_lora.LORA).read_bytes())
    (run / "training_log.jsonl").write_text("{}")
    before = contents(tmp_path)
    line = told_by(script, monkeypatch, capsys, words)
    assert any(name in line for name in ("mine", "missing", "toy.webp"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (assemble, ["--text", TOY, "--vae", DECODER / "vae"], "--vae: there is no file"),
        (assemble, [*PARTS, "--trained", DECODER], "--trained: there is no file"),
        (train_vae, ["--learning_rate", "nan"], "--learning_rate must be a number of at least 0, got nan"),
        (train_vae, ["--kl_weight", "-1"], "--kl_weight must be a number of at least 0, got -1.0"),
        (train_vae, ["--device", "cuda:9"], "there is no device 'cuda:9' here"),
        (train_decoder, ["--learning_rate", "inf"], "--learning_rate must be a number above 0, got inf"),
        (evaluate, ["--model", TOY, "--device", "cuda:9"], "there is no device 'cuda:9' here"),
        (evaluate, ["--model", TOY, "--nvfp4_backend", "te"], "--nvfp4_backend te needs TransformerEngine"),
        (evaluate, ["--model", TOY, "--lora", TOY / "vae" / "config.json"], "config.json"),
    ],
)
def test_bad_values_are_one_line(script, words, message, tmp_path, monkeypatch, capsys):
    assert message in told_by(script, monkeypatch, capsys, [*words, "--output", tmp_path / "new"])
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_of_a_vae_lies_beside_its_folder_however_that_is_named(tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def begin(vae, settings, device, checkpoint):
        assert checkpoint == tmp_path / "new.checkpoint.pt"
        raise Begun

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(train_vae, "train", begin)
    for folder, name in (("new", "."), ("", "new"), ("new", "../new")):
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(sys, "argv", ["train_vae.py", "--output", name, "--device", "cpu"])
        with pytest.raises(Begun):
            train_vae.main()


@pytest.mark.parametrize("script", sorted(path.name for path in TOY_SCRIPTS if "__main__" in path.read_text()))
def test_every_script_ends_with_one_line_where_something_fails(script):
    assert "sys.exit(run(main))" in (ROOT / "training" / "toy" / script).read_text()


def write_world(monkeypatch, folder: Path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["world.py", "--output", str(folder), "--num_workers", "1", *words])
    world.main()


def test_a_dataset_is_completed_and_never_mixed(tmp_path, monkeypatch, capsys):
    write_world(monkeypatch, tmp_path, "--num_samples", "2", "--num_chunks", "1")
    made = contents(tmp_path)
    for others, message in (
        (["--num_samples", "2", "--num_chunks", "2"], "its --seed and --num_chunks"),
        (["--num_samples", "3", "--num_chunks", "1", "--seed", "1"], "its --seed and --num_chunks"),
        (["--num_samples", "1", "--num_chunks", "1"], "more --num_samples than 1"),
    ):
        assert message in told_by(world, monkeypatch, capsys, ["--output", tmp_path, *others])
        assert contents(tmp_path) == made
    write_world(monkeypatch, tmp_path, "--num_samples", "3", "--num_chunks", "1")
    completed = contents(tmp_path)
    assert completed.items() > made.items()
    write_world(monkeypatch, tmp_path, "--num_samples", "3", "--num_chunks", "1")
    assert contents(tmp_path) == completed
