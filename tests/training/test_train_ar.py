"""A run of `train_ar.py` from end to end: its losses, its result, and the ways it may be started."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, WanTransformer3DModel
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file

import train_ar
from data.text_encoder import TextEncoder
from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.video.reader import read_video
from run.log import read_log
from run.validation import Validation


VALIDATED = {"validation_prompts": ["a red circle"], "validation_num_inference_steps": 1}
CURVE = Path(__file__).with_name("loss_curve.json")


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(folder / "training_log.jsonl")]


def test_a_fixed_seed_gives_the_committed_loss_curve(long_run):
    assert losses(long_run) == pytest.approx(json.loads(CURVE.read_text()), rel=1e-3)


def test_the_result_is_a_pipeline_of_the_averaged_weights(long_run, workshop):
    pipe = DiffusionPipeline.from_pretrained(long_run)
    assert type(pipe) is LongLivePipeline
    start = load_file(workshop.folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    state = torch.load(long_run / "checkpoint-28" / "training_state_0.pt", weights_only=True)
    assert state["ema"]["optimization_step"] == 28
    trained = pipe.transformer.state_dict()
    assert trained.keys() == start.keys()
    assert all(not torch.equal(trained[name], start[name]) for name in start if name.endswith("to_q.weight"))


def test_validation_makes_videos(long_run):
    folder = long_run / "validation" / "step-30"
    for name in ("0.mp4", "1.mp4"):
        frames, fps = read_video(folder / name)
        assert frames.shape == (29, 64, 64, 3) and fps == 24


def test_the_card_says_how_it_was_trained_and_names_no_folder_of_this_machine(long_run, workshop):
    card = (long_run / "README.md").read_text()
    assert "| updates | 30 |" in card and "longlive-diffusers" in card
    assert str(workshop.folder) not in card and str(long_run.parent) not in card


def test_old_checkpoints_are_pruned_and_nothing_partial_stays(long_run):
    assert {path.name for path in long_run.glob("checkpoint-*")} == {"checkpoint-24", "checkpoint-28"}
    assert not list(long_run.rglob("*.partial"))


@pytest.mark.parametrize(
    ("processes", "sp_size", "batch"), [(2, 2, 2), (4, 4, 2), (4, 2, 1)], ids=lambda value: str(value)
)
def test_processes_that_share_clips_or_have_their_own_give_the_single_process_run(
    workshop, single, tmp_path, processes, sp_size, batch
):
    output = tmp_path / "run"
    start = workshop.launch if processes == 2 else workshop.run  # `accelerate launch` takes a while
    start(output, processes, sp_size=sp_size, train_batch_size=batch, max_train_steps=2, ema_decay=None)
    for ours, theirs in zip(read_log(output / "training_log.jsonl"), single, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)


@pytest.fixture(scope="module")
def single(workshop, tmp_path_factory) -> list[dict]:
    """The record of two updates in one process."""
    output = tmp_path_factory.mktemp("single") / "run"
    workshop.run(output, max_train_steps=2, ema_decay=None)
    return read_log(output / "training_log.jsonl")


def test_accumulated_batches_are_one_batch(workshop, single, tmp_path):
    output = tmp_path / "run"
    workshop.run(output, train_batch_size=1, gradient_accumulation_steps=2, max_train_steps=2, ema_decay=None)
    for ours, theirs in zip(read_log(output / "training_log.jsonl"), single, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)


def test_videos_encoded_when_needed_each_rank_its_own_frames_and_a_halo(workshop, single, tmp_path):
    output = tmp_path / "run"
    workshop.run(
        output, 2, sp_size=2, cache_latents=False, gradient_checkpointing=True, max_train_steps=2, ema_decay=None
    )
    for ours, theirs in zip(read_log(output / "training_log.jsonl"), single, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_lora_is_trained_saved_and_loaded(workshop, tmp_path):
    output = tmp_path / "run"
    workshop.run(output, rank=4, max_train_steps=3, checkpointing_steps=2)
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    assert len(weights) == 2 * 2 * 10 and all(name.startswith("transformer.blocks.") for name in weights)
    assert not (output / "model_index.json").exists()
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model is None and "| LoRA rank | 4 |" in card.text and "huggingface.co/None" not in card.text
    for path in (output / "README.md", output / "pytorch_lora_weights.safetensors"):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(workshop.folder).encode() not in path.read_bytes()
    pipe = DiffusionPipeline.from_pretrained(workshop.folder / "pipeline")
    arguments = {"prompt": "a red circle", "num_frames": 13, "num_inference_steps": 2, "output_type": "latent"}
    before = pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames
    pipe.load_lora_weights(output)
    after = pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames
    assert (before - after).abs().max() > 1e-4


def test_a_wan_pipeline_is_a_start_with_the_chunks_one_asks_for(workshop, tmp_path):
    folder = tmp_path / "wan"
    pipe = LongLivePipeline.from_pretrained(workshop.folder / "pipeline")
    pipe.save_pretrained(folder)
    names = ("chunk_size", "sample_height", "sample_width")
    config = {name: value for name, value in pipe.transformer.config.items() if name not in names and name[0] != "_"}
    wan = WanTransformer3DModel(**config)
    wan.load_state_dict(pipe.transformer.state_dict())
    wan.save_pretrained(folder / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))

    output = tmp_path / "run"
    sizes = {"chunk_size": 4, "height": 64, "width": 64, "data_cache_dir": tmp_path / "cache"}
    workshop.run(output, pretrained_model_name_or_path=folder, max_train_steps=1, **sizes)
    trained = LongLivePipeline.from_pretrained(output)
    assert trained.transformer.config.chunk_size == 4


def test_the_text_encoder_is_loaded_only_where_prompts_are_missing(workshop, tmp_path, monkeypatch):
    loaded = []
    pipe_of = TextEncoder.pipe.func
    monkeypatch.setattr(TextEncoder.pipe, "func", lambda encoder: loaded.append(encoder.dtype) or pipe_of(encoder))
    options = {"data_cache_dir": tmp_path / "cache", "max_train_steps": 1, "validation_num_inference_steps": 1}
    for prompts, expected in [
        (["a red circle"], 1),  # nothing is cached
        (["a red circle"], 1),
        (["a red circle", "a red circle | a blue square"], 2),
    ]:
        number = len(list(tmp_path.iterdir()))
        workshop.main(tmp_path / f"run-{number}", **options, validation_prompts=prompts)
        assert loaded == [torch.float32] * expected
    output = tmp_path / "without videos"
    workshop.main(output, **options | {"train_data_dir": None}, validation_prompts=["a dot"])
    assert len(loaded) == 3
    assert len(list((output / "validation" / "step-1").glob("*.mp4"))) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_latent_frames": 7}, "7 is no multiple of 2"),
        ({"height": 60}, "60x64"),
        ({"learning_rate": 0}, "--learning_rate must be positive, got 0.0"),
        ({"ema_decay": 1.0}, "--ema_decay must be in [0, 1), got 1.0"),
        ({"lora_alpha": 8}, "--lora_alpha 8 needs a --rank"),
        ({"image_probability": 1.5}, "image_probability is a probability in [0, 1], got 1.5"),
        ({"train_data_dir": "no/such/folder"}, "no/such/folder"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "There is no checkpoint 'checkpoint-3'"),
        ({"sp_size": 3}, "--sp_size 3"),
        ({"pretrained_model_name_or_path": "no/such/model"}, "'no/such/model' has no transformer to start from"),
        ({"lr_scheduler": "sine"}, "invalid choice: 'sine'"),
        ({"report_to": "telegraph"}, "--report_to telegraph is no tracker"),
        ({"rank": 2, "lora_layers": "nothing"}, "--lora_layers 'nothing': Target modules nothing not found"),
        ({"attention_backend": "telepathy"}, "telepathy"),
        ({"attention_backend": "flex"}, "--attention_backend flex has no gradients on a CPU"),
        (VALIDATED | {"validation_num_inference_steps": 1001}, "from 1 to 1000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named_before_anything_is_encoded(workshop, tmp_path, changed, message):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=re.escape(message)):
        workshop.main(output, **{"data_cache_dir": tmp_path / "cache"} | changed)
    assert not list(tmp_path.glob("cache/latents"))
    assert not list(output.glob("checkpoint-*")) and not (output / "training_log.jsonl").exists()


def test_a_validation_that_fails_is_named_and_loses_nothing(workshop, tmp_path, monkeypatch, caplog):
    """Not even the last one: the result is written before it. The network makes the other videos, too: where weights
    are sharded, other processes wait for that."""
    output, saved, made = tmp_path / "run", [], []
    make_latents = Validation._make_latents

    def counted(self, accelerator, index, prompt):
        made.append(index)
        return make_latents(self, accelerator, index, prompt)

    def full_disk(*_, **__):
        saved.append((output / "model_index.json").exists())
        raise OSError("No space left on device")

    monkeypatch.setattr("run.validation.VideoWriter", full_disk)
    monkeypatch.setattr(Validation, "_make_latents", counted)
    two = VALIDATED | {"validation_prompts": ["a red circle", "a blue square"]}
    workshop.main(output, **two, max_train_steps=2, validation_steps=1)
    assert saved == [False, True] and made == [0, 1, 0, 1]
    for step in (1, 2):
        assert f"the validation after update {step} failed, training goes on: No space left on device" in caplog.text
    assert len(losses(output)) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError("No space left on device"), "No space"), (SafetensorError("File too large"), "could not be written")],
    ids=["other", "safetensors"],
)
def test_a_result_that_cannot_be_saved_leaves_its_updates_in_a_checkpoint(
    workshop, tmp_path, monkeypatch, error, told
):
    output, save = tmp_path / "run", LongLiveTransformer3DModel.save_pretrained

    def full_disk(*_, **__):
        raise error

    with monkeypatch.context() as patch, pytest.raises(OSError, match=told):
        patch.setattr(LongLiveTransformer3DModel, "save_pretrained", full_disk)
        workshop.main(output, max_train_steps=2)
    assert sorted(path.name for path in output.glob("[!.]*")) == ["checkpoint-2", "training_log.jsonl"]
    assert LongLiveTransformer3DModel.save_pretrained is save
    workshop.main(output, max_train_steps=2, resume_from_checkpoint="latest")
    assert (output / "model_index.json").exists() and len(losses(output)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_result_is_saved_ends_the_run_after_it(workshop, tmp_path, monkeypatch, caplog, number):
    """Without its videos."""
    output, save = tmp_path / "run", LongLiveTransformer3DModel.save_pretrained

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        save(*args, **kwargs)

    monkeypatch.setattr(LongLiveTransformer3DModel, "save_pretrained", interrupted)
    with pytest.raises(SystemExit) as ended:
        workshop.main(output, **VALIDATED, max_train_steps=1)
    assert ended.value.code == 128 + number and f"ended by {number.name}; the result is saved" in caplog.text
    assert LongLivePipeline.from_pretrained(output).transformer is not None
    assert not (output / "validation").exists()


def test_validation_videos_are_like_the_clips(workshop, tmp_path):
    output = tmp_path / "run"
    shape = {"height": 32, "width": 48, "fps": 12, "data_cache_dir": tmp_path / "cache"}
    workshop.main(output, **VALIDATED, **shape, num_latent_frames=4, max_train_steps=1)
    frames, fps = read_video(output / "validation" / "step-1" / "0.mp4")
    assert frames.shape == (13, 32, 48, 3) and fps == 12
    assert "fps=12" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("--rank must be\n  positive"), 2, "train_ar.py: error: --rank must be positive"),
        (FileNotFoundError("no such video"), 1, "train_ar.py: error: no such video"),
        (FloatingPointError("The loss is nan"), 1, "train_ar.py: error: The loss is nan"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "train_ar.py: error: CUDA out of memory"),
        (KeyboardInterrupt(), 130, "train_ar.py: interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_mistake_is_told_in_one_line(tmp_path, monkeypatch, capsys, error, status, told):
    def fail(_):
        raise error

    monkeypatch.setattr(train_ar, "main", fail)
    assert train_ar.run(["--pretrained_model_name_or_path", "model", "--output_dir", str(tmp_path)]) == status
    assert capsys.readouterr().err.splitlines() == [told]


def test_a_mistake_on_the_command_line_is_told_in_one_line(capsys):
    assert train_ar.run(["--output_dir", "x", "--optimizer", "AdamW"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_ar.py: error: argument --optimizer: invalid choice: 'AdamW'")


@pytest.mark.parametrize("rank", [None, 4])
def test_the_distance_at_a_cut_is_that_of_training_in_validation_result_and_card(
    workshop, tmp_path, monkeypatch, rank
):
    seen = []
    monkeypatch.setattr(Validation, "run", lambda self, *_: seen.append(self.pipe.config.multi_shot_rope_offset))
    options = {"max_train_steps": 1, "validation_prompts": ["a red circle"], "rank": rank}
    workshop.main(tmp_path / "run", **options, multi_shot_rope_offset=0.5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert seen == [0.5] and "| distance in time positions at a cut | 0.5 |" in card
    if rank is None:
        assert LongLivePipeline.from_pretrained(tmp_path / "run").config.multi_shot_rope_offset == 0.5
    else:
        assert "    multi_shot_rope_offset=0.5,\n" in card


def test_a_gradient_that_is_no_number_ends_the_run_before_a_checkpoint(workshop, tmp_path, monkeypatch):
    """Though the loss before it is finite."""
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="The norm of the gradient is nan"):
        workshop.main(tmp_path / "run", max_train_steps=1, checkpointing_steps=1)
    assert not list(tmp_path.glob("run/checkpoint-*"))
