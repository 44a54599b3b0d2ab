"""A run of `train_dmd.py` from end to end: its losses, its result, and the ways it may be started."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train_dmd
from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.video.reader import read_video
from run.log import read_log
from run.validation import Validation
from tests.support import processes
from tests.support.distillation_run import LONG_RUN, SCRIPT
from tests.support.training_run import environment, run_script


CURVE = Path(__file__).with_name("dmd_loss_curves.json")
LORA = "pytorch_lora_weights.safetensors"
LOG = "training_log.jsonl"


@pytest.fixture(scope="session")
def distilled(studio, tmp_path_factory) -> Path:
    """The folder of a run of 20 steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("dmd") / "run"
    prompts = ["a red circle moves right", "a blue square moves up | a green cross stays still"]
    studio.run(output, **LONG_RUN, validation_prompts=prompts, validation_steps=100)
    return output


def log(folder: Path) -> list[dict]:
    return read_log(folder / LOG)


def curves(folder: Path) -> dict[str, list[float]]:
    names = ("generator_loss", "critic_loss")
    return {name: [entry[name] for entry in log(folder) if name in entry] for name in names}


def same_updates(ours: list[dict], theirs: list[dict], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, rel=tolerance)


def test_a_fixed_seed_gives_the_committed_curves(distilled):
    found, expected = curves(distilled), json.loads(CURVE.read_text())
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=2e-3), name
    assert len(found["critic_loss"]) == 20 and len(found["generator_loss"]) == 10


def test_the_result_is_a_lora_that_the_pipeline_opens(distilled, studio):
    weights = load_file(distilled / LORA)
    assert len(weights) == 2 * 2 * 10 and all(name.startswith("transformer.blocks.") for name in weights)
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    pipe = DiffusionPipeline.from_pretrained(studio.folder / "pipeline")
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent", "num_frames": 5}
    options |= {"max_sequence_length": 32}

    def made() -> torch.Tensor:
        return pipe("a red circle moves right", generator=torch.Generator().manual_seed(0), **options).frames

    before = made()
    pipe.load_lora_weights(distilled)
    assert (made() - before).abs().max() > 1e-4
    pipe.unload_lora_weights()
    assert torch.equal(made(), before)


def test_validation_makes_videos_with_the_steps_that_are_distilled(distilled):
    for name in ("0.mp4", "1.mp4"):
        frames, fps = read_video(distilled / "validation" / "step-20" / name)
        assert frames.shape == (29, 64, 64, 3) and fps == 24


def test_the_card_says_how_it_was_distilled_and_names_no_folder_of_this_machine(distilled, studio):
    card = ModelCard.load(distilled / "README.md")
    for row in ("| updates of the fake score | 20 |", "| updates of the generator | 10 |", "| solver steps | 2 |"):
        assert row in card.text
    assert "num_inference_steps=2" in card.text and "guidance_scale=1.0" in card.text
    for path in (distilled / "README.md", distilled / LORA):
        assert str(studio.folder).encode() not in path.read_bytes()
        assert str(distilled.parent).encode() not in path.read_bytes()


def test_old_checkpoints_are_pruned_and_hold_no_frozen_weights(distilled):
    assert {path.name for path in distilled.glob("checkpoint-*")} == {"checkpoint-15", "checkpoint-18"}
    state = torch.load(distilled / "checkpoint-18" / "training_state_0.pt", weights_only=True)
    assert state["generator"].keys() and state["fake_score"].keys()
    assert all(".lora_" in name for role in ("generator", "fake_score") for name in state[role])
    assert not list((distilled / "checkpoint-18").glob("model*.safetensors"))


def last_step(output: Path) -> int:
    return log(output)[-1]["step"] if (output / LOG).exists() and log(output) else 0


def test_a_run_killed_five_times_gives_the_uninterrupted_one(studio, distilled, tmp_path):
    """Both LoRAs, their optimizers, the average and what is random: to the last bit."""
    output, rng = tmp_path / "run", random.Random(time.time_ns())
    words = studio.options(output, **LONG_RUN, resume_from_checkpoint="latest")
    for after in (1, 4, 8, 12, 17):
        run, deadline = processes.start([SCRIPT, *words], environment()), time.monotonic() + 240
        while last_step(output) < after:
            assert run.poll() is None, run.errors[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        assert run.poll() is None
        run.kill()
    run_script(words, script=SCRIPT)
    assert log(output) == log(distilled)  # every loss, gradient norm and learning rate, bit for bit
    ours, theirs = load_file(output / LORA), load_file(distilled / LORA)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(output.glob("*.partial"))


@pytest.fixture(scope="session")
def single(studio, tmp_path_factory) -> Path:
    """A run of 3 steps of 4 videos in one process."""
    output = tmp_path_factory.mktemp("dmd_single") / "run"
    studio.main(output, train_batch_size=4)
    return output


@pytest.mark.parametrize(
    ("processes", "sp_size", "batch"), [(2, 1, 2), (2, 2, 4), (4, 2, 2)], ids=lambda value: str(value)
)
def test_processes_give_the_run_of_one(studio, single, tmp_path, processes, sp_size, batch):
    output = tmp_path / "run"
    start = studio.launch if sp_size == 1 else studio.run
    start(output, processes, sp_size=sp_size, train_batch_size=batch)
    same_updates(log(output), log(single), 2e-5)
    ours, theirs = load_file(output / LORA), load_file(single / LORA)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5)


def test_accumulated_batches_are_one_batch(studio, single, tmp_path):
    studio.main(tmp_path / "run", train_batch_size=1, gradient_accumulation_steps=4)
    same_updates(log(tmp_path / "run"), log(single), 2e-5)


@pytest.mark.parametrize("offloads", [False, True])
def test_gradient_checkpointing_changes_nothing(studio, single, tmp_path, offloads):
    studio.main(tmp_path / "run", train_batch_size=4, gradient_checkpointing=True, activation_offloading=offloads)
    same_updates(log(tmp_path / "run"), log(single), 1e-6)


def test_a_longer_roll_out_than_the_window_carries_gradients_in_its_last_chunks(studio, tmp_path):
    output = tmp_path / "run"
    options = {"num_latent_frames": 16, "window_size": 6, "sink_size": 2, "multi_shot_sink": True}
    studio.main(output, **options, score_latent_frames=8, gradient_chunks=2)
    assert all(value > 0 for entry in log(output) for value in entry.values())
    card = (output / "README.md").read_text()
    assert "| chunks with a gradient | 2 |" in card and "| latent frames that the scores see | 8 |" in card


@pytest.mark.parametrize("dtype", ["nvfp4", "fp8_attention", "bfloat16"])
def test_the_roll_outs_cache_may_be_stored_in_fewer_bits(studio, single, tmp_path, dtype):
    try:
        studio.main(tmp_path / "run", kv_cache_dtype=dtype, max_train_steps=1)
    except ValueError as error:
        assert "NVFP4" in str(error) and dtype == "nvfp4"  # not with heads of 16 channels
        return
    assert log(tmp_path / "run")[0]["generator_loss"] > 0


def test_a_base_in_four_bits(studio, tmp_path):
    output = tmp_path / "run"
    studio.main(output, precision="nvfp4", max_train_steps=2)
    assert load_file(output / LORA)["transformer.blocks.0.attn1.to_q.lora_B.weight"].any()
    assert "with the frozen weights in NVFP4" in (output / "README.md").read_text()


def test_all_weights_are_trained_if_that_is_asked_for(studio, tmp_path):
    output = tmp_path / "run"
    studio.main(output, train_all_weights=True, max_train_steps=2, rank=None, learning_rate=1e-4)
    pipe = LongLivePipeline.from_pretrained(output)
    before = load_file(studio.folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) // 2
    assert "num_inference_steps=2" in (output / "README.md").read_text()


@pytest.mark.parametrize("whole", [False, True], ids=["LoRA", "all weights"])
def test_validation_result_and_card_have_the_settings_of_the_roll_outs(studio, tmp_path, monkeypatch, whole):
    settings = {"window_size": 6, "sink_size": 4, "multi_shot_sink": False, "multi_shot_rope_offset": 0.5}
    seen = []
    monkeypatch.setattr(Validation, "run", lambda self, *_: seen.append((self.pipe.config, self.kv_cache_dtype)))
    options = {"max_train_steps": 1, "train_all_weights": whole, "rank": None if whole else 4, **settings}
    output = tmp_path / "run"
    studio.main(output, **options, validation_prompts=["a red circle"], kv_cache_dtype="fp8")
    ((config, dtype),) = seen
    card = (output / "README.md").read_text()
    assert settings.items() <= config.items() and dtype == "fp8"
    assert "| distance in time positions at a cut | 0.5 |" in card
    if whole:
        assert settings.items() <= LongLivePipeline.from_pretrained(output).config.items()
    else:
        assert all(f"    {name}={value},\n" in card for name, value in settings.items())


def test_another_teacher_is_the_real_score(studio, single, tmp_path):
    output = tmp_path / "run"
    studio.main(output, teacher_model_name_or_path=studio.folder / "pipeline", train_batch_size=4)
    same_updates(log(output), log(single), 1e-5)  # the same network, loaded once more
    other = LongLivePipeline.from_pretrained(studio.folder / "pipeline")
    torch.nn.init.normal_(other.transformer.proj_out.weight, std=0.1)
    other.save_pretrained(tmp_path / "other")
    studio.main(tmp_path / "second", teacher_model_name_or_path=tmp_path / "other", train_batch_size=4)
    assert log(tmp_path / "second")[0]["generator_loss"] != pytest.approx(log(single)[0]["generator_loss"], rel=0.01)


def test_a_lora_may_be_what_the_generator_begins_with(studio, distilled, tmp_path):
    output = tmp_path / "run"
    studio.main(output, generator_lora=distilled / LORA, max_train_steps=1, learning_rate=1e-9)
    ours, theirs = load_file(output / LORA), load_file(distilled / LORA)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_a_standalone_lora_is_validated_on_the_model_that_it_is_for(studio, tmp_path):
    output = tmp_path / "run"
    options = {"start": "standalone", "ar_model_name_or_path": studio.folder / "pipeline", "max_train_steps": 1}
    studio.main(output, **options, validation_prompts=["a red circle"], save_original_lora=True)
    assert (output / "validation" / "step-1" / "0.mp4").is_file()
    card = (output / "README.md").read_text()
    assert "noised like the chunk" in card and str(studio.folder) not in card
    reference = torch.load(output / "generator_lora.pt", weights_only=True)["generator_lora"]
    assert "base_model.model.blocks.0.self_attn.q.lora_A.weight" in reference
    pipe = DiffusionPipeline.from_pretrained(studio.folder / "pipeline")
    pipe.load_lora_weights(output / "generator_lora.pt")


@pytest.mark.parametrize("alpha", [2, 4, 8])
def test_the_lora_in_the_references_layout_changes_the_weights_as_much(studio, tmp_path, alpha):
    output = tmp_path / "run"
    studio.main(output, rank=4, lora_alpha=alpha, max_train_steps=1, save_original_lora=True)
    changes = []
    for file in (LORA, "generator_lora.pt"):
        pipe = LongLivePipeline.from_pretrained(studio.folder / "pipeline")
        before = pipe.transformer.blocks[0].attn1.to_q.weight.detach().clone()
        pipe.load_lora_weights(output / file)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        changes.append(pipe.transformer.blocks[0].attn1.to_q.weight.detach() - before)
    assert changes[0].abs().max() > 1e-6
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-3, atol=1e-8)


def test_a_lora_of_another_rank_is_validated_on_the_model_that_it_is_for(studio, distilled, tmp_path, caplog):
    output = tmp_path / "run"
    options = {"start": "standalone", "ar_model_name_or_path": studio.folder / "pipeline", "max_train_steps": 1}
    with caplog.at_level("WARNING"):
        studio.main(output, **options, rank=2, generator_lora=distilled / LORA, validation_prompts=["a red circle"])
    assert (output / "validation" / "step-1" / "0.mp4").is_file(), caplog.text
    assert load_file(output / LORA)["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape[0] == 4


def test_videos_begin_with_images(studio, tmp_path):
    output = tmp_path / "run"
    studio.main(
        output,
        prompts=None,
        image_conditioning=True,
        train_data_dir=studio.folder / "videos",
        data_cache_dir=tmp_path / "cache",
        max_train_steps=2,
    )
    assert all(entry["critic_loss"] > 0 for entry in log(output))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"rank": 8}, "rank is 4 there and 8 here"),
        ({"num_inference_steps": 4}, "num_inference_steps is 2 there and 4 here"),
        ({"generator_interval": 5}, "generator_interval is 2 there and 5 here"),
        ({"start": "standalone"}, "start is direct there and standalone here"),
        ({"gradient_chunks": 1}, "gradient_chunks is 4 there and 1 here"),
        ({"max_train_steps": 17}, "has 18 updates, more than --max_train_steps 17"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_may_not_change_is_named(studio, distilled, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        studio.main(tmp_path / "run", **LONG_RUN | changed, resume_from_checkpoint=distilled / "checkpoint-18")


def test_what_changes_is_used_named_and_on_the_card(studio, distilled, tmp_path, caplog):
    changed = {"learning_rate": 5e-4, "critic_learning_rate": 2e-4, "max_train_steps": 19}
    output = tmp_path / "run"
    with caplog.at_level("INFO"):
        studio.main(output, **LONG_RUN | changed, resume_from_checkpoint=distilled / "checkpoint-18")
    for name in ("learning_rate", "critic_learning_rate"):
        assert f"{name} was 0.001 until update 18 and is {changed[name]} from there on" in caplog.text
    assert "0.001; 0.0002 from update 19 on" in (output / "README.md").read_text()


def test_shots_that_are_never_made_are_named(studio, tmp_path, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("[2] a red circle | [9] a blue square\na green cross | a pink square\n")
    with caplog.at_level("WARNING"):
        studio.main(tmp_path / "run", prompts=prompts, num_latent_frames=4, max_train_steps=1, train_batch_size=1)
    assert "1 of 2 videos have shots that do not fit into 2 chunks" in caplog.text
    card = (tmp_path / "run" / "README.md").read_text()
    rows = ("| chunks with a gradient | 2 |", "| teacher | the model to start from |", "| keys and values stored as |")
    assert all(row in card for row in rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": None}, "--prompts is missing"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"num_latent_frames": 7}, "--num_latent_frames 7 is no multiple of 2"),
        ({"score_latent_frames": 10}, "more than the roll-out has"),
        ({"gradient_chunks": 5}, "--gradient_chunks 5"),
        ({"num_inference_steps": 0}, "--num_inference_steps must be in [1, 1000]"),
        ({"window_size": 2, "sink_size": 2}, "window_size"),
        ({"kv_cache_dtype": "int3"}, "invalid choice: 'int3'"),
        ({"lora_dropout": 0.1}, "--lora_dropout 0.1"),
        ({"lora_layers": "nothing"}, "--lora_layers 'nothing'"),
        ({"train_all_weights": True, "rank": None, "save_original_lora": True}, "trains no LoRA"),
        ({"train_all_weights": True, "rank": None, "start": "standalone"}, "--start standalone"),
        ({"ar_model_name_or_path": "x"}, "--ar_model_name_or_path is for --start standalone"),
        ({"start": "standalone", "validation_prompts": ["x"]}, "--validation_prompts need it"),
        ({"train_all_weights": True}, "--rank 4 needs LoRAs: --train_all_weights true trains none"),
        ({"start": "halfway"}, "--start: invalid choice: 'halfway'"),
        ({"compile": True}, "--compile is not possible here"),
        ({"generator_lora": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"teacher_model_name_or_path": "nowhere"}, "'nowhere' has no transformer"),
        ({"critic_learning_rate": 0}, "--critic_learning_rate must be positive"),
        ({"image_conditioning": True}, "needs --train_data_dir"),
        ({"image_probability": 0.5}, "--image_probability 0.5 needs --image_conditioning"),
        ({"num_inference_steps": 2000}, "--num_inference_steps must be in [1, 1000], got 2000"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_possible_is_said_in_one_line_before_anything_is_written(
    studio, tmp_path, capsys, monkeypatch, changed, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable has been read by now
    words = studio.options(tmp_path / "run", **changed)
    assert train_dmd.run(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("train_dmd.py: error: ") and message in lines[-1]
    assert not list(tmp_path.rglob(LORA)) and not list(tmp_path.rglob("checkpoint-*"))


def test_a_teacher_that_cannot_see_the_videos_is_refused(studio, tmp_path):
    config = {**LongLivePipeline.from_pretrained(studio.folder / "pipeline").transformer.config, "text_dim": 24}
    LongLiveTransformer3DModel.from_config(config).save_pretrained(tmp_path / "teacher" / "transformer")
    with pytest.raises(ValueError, match="text_dim is 24 there and 16 here"):
        studio.main(tmp_path / "run", teacher_model_name_or_path=tmp_path / "teacher")


def test_a_gradient_that_is_no_number_ends_the_run_before_a_checkpoint(studio, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="The norm of the gradient of the generator is inf"):
        studio.main(tmp_path / "run", max_train_steps=1, checkpointing_steps=1)
    assert not list(tmp_path.glob("run/checkpoint-*"))
