"""What the network is shown in teacher forcing, and what it is to predict."""

import numpy as np
import pytest
import torch

from longlive_diffusers import LongLiveScheduler
from longlive_diffusers.parallel import FrameLayout
from objectives.error_recycling import ErrorRecycler, RecyclingSettings
from objectives.teacher_forcing import TeacherForcing, TeacherForcingSettings


F, CHUNK, CHANNELS, LENGTH, DIM = 8, 2, 3, 5, 4
ALWAYS = {"image_probability": 1.0, "prompt_dropout": 1.0, "history_noise_probability": 1.0}


def objective(num_ranks=1, rank=0, recycler=None, seed=0, **settings) -> TeacherForcing:
    return TeacherForcing(
        LongLiveScheduler(),
        TeacherForcingSettings(**settings),
        multi_shot_rope_offset=8.0,
        seed=seed,
        layout=FrameLayout(F, num_ranks, CHUNK),
        rank=rank,
        empty_prompt=torch.full((LENGTH, DIM), -1.0),
        recycler=recycler,
    )


def items(sample_ids=(0, 1)) -> dict:
    generator = torch.Generator().manual_seed(1)
    batch = len(sample_ids)
    mask = torch.ones(batch, F // CHUNK, dtype=torch.bool)
    mask[-1, -1] = False
    return {
        "latents": torch.randn(batch, CHANNELS, F, 4, 4, generator=generator),
        "prompt_embeds": torch.randn(batch, F // CHUNK, LENGTH, DIM, generator=generator),
        "shot_index": torch.tensor([[0, 0, 1, 2]] * batch),
        "loss_mask": mask,
        "sample_id": torch.tensor(sample_ids),
    }


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("recycles", [False, True])
def test_draws_that_are_made_ahead_are_the_same(recycles, num_ranks):
    """In two steps: the first stores errors that the second, whose draws were made before that, adds."""
    settings = RecyclingSettings(error_recycling=True, error_warmup_steps=1, error_clean_probability=0.0)
    ahead, at_once = (
        objective(num_ranks, 0, recycler=ErrorRecycler(settings, CHUNK) if recycles else None, **ALWAYS)
        for _ in range(2)
    )
    drawn = [ahead.with_draws(items(ids), step) for step, ids in enumerate([(0, 1), (2, 3)])]
    for step, batch in enumerate(drawn):
        found, expected = (
            task.prepare(data, step, torch.device("cpu"))
            for task, data in ((ahead, batch), (at_once, items(tuple(batch["sample_id"].tolist()))))
        )
        assert list(found.arguments) == list(expected.arguments)
        for name, tensor in found.arguments.items():
            assert torch.equal(tensor, expected.arguments[name]), name
        for name in ("latents", "noise", "target", "frame_weight", "loss_mask"):
            assert torch.equal(vars(found)[name], vars(expected)[name]), name
        assert found.recycling == expected.recycling
        for task, prepared in ((ahead, found), (at_once, expected)):
            task.keep_errors(torch.ones_like(prepared.target), prepared)


def test_videos_that_are_not_encoded_yet_have_no_draws():
    batch = items() | {"pixels": torch.zeros(1)}
    del batch["latents"]
    assert "draws" not in objective().with_draws(batch, 0)


def test_noise_target_and_weights_are_those_of_the_scheduler():
    data, scheduler = items(), LongLiveScheduler()
    batch = objective().prepare(data, 0, torch.device("cpu"))
    timestep = batch.arguments["timestep"]
    assert torch.equal(timestep[:, 0::2], timestep[:, 1::2])  # one time for each chunk
    assert len(timestep[:, ::2].unique()) == 8  # and a different one, here
    sigma = scheduler.sigmas_at(timestep)[:, None, :, None, None]
    expected = (1 - sigma) * data["latents"] + sigma * batch.noise
    torch.testing.assert_close(batch.arguments["hidden_states"], expected)
    torch.testing.assert_close(batch.target, batch.noise - data["latents"])
    torch.testing.assert_close(
        batch.frame_weight, scheduler.weight(timestep) * data["loss_mask"].repeat_interleave(CHUNK, dim=1)
    )
    assert torch.equal(batch.arguments["clean_hidden_states"], data["latents"])
    assert not batch.arguments["clean_timestep"].any()
    assert batch.arguments["frame_positions"][0].tolist() == [0, 1, 2, 3, 12, 13, 22, 23]


def test_the_error_of_a_frame_counts_by_its_weight_and_only_where_it_bears_loss():
    data = items()
    batch = objective().prepare(data, 0, torch.device("cpu"))
    velocity = batch.target + 2.0
    assert objective().error_sum(velocity, batch) == pytest.approx(4 * batch.frame_weight.sum().item())
    velocity[1, :, -CHUNK:] = 1e3  # padding
    assert objective().error_sum(velocity, batch) == pytest.approx(4 * batch.frame_weight.sum().item())


def test_a_given_image_is_clean_at_time_zero_and_bears_no_loss():
    data = items()
    batch = objective(image_probability=1.0).prepare(data, 0, torch.device("cpu"))
    assert torch.equal(batch.arguments["hidden_states"][:, :, 0], data["latents"][:, :, 0])
    assert not batch.arguments["timestep"][:, 0].any() and batch.arguments["timestep"][:, 1].all()
    assert not batch.frame_weight[:, 0].any() and not batch.loss_mask[:, 0].any()
    assert batch.loss_mask[0, 1:].all()


def test_a_single_chunk_is_shown_without_history():
    data = items()
    whole = objective().prepare(data, 0, torch.device("cpu"))
    first = {
        name: value[:, :, :CHUNK] if name == "latents" else value[:, :1] if name != "sample_id" else value
        for name, value in data.items()
    }
    alone = TeacherForcing(
        LongLiveScheduler(),
        TeacherForcingSettings(),
        multi_shot_rope_offset=8.0,
        seed=0,
        layout=FrameLayout(CHUNK, 1, CHUNK),
        rank=0,
        empty_prompt=torch.full((LENGTH, DIM), -1.0),
    ).prepare(first, 0, torch.device("cpu"))
    assert "clean_hidden_states" in whole.arguments and "clean_timestep" in whole.arguments
    assert alone.arguments.keys() == whole.arguments.keys() - {"clean_hidden_states", "clean_timestep"}
    assert alone.arguments["hidden_states"].shape[2] == CHUNK and alone.loss_mask.all()


def test_dropped_prompts_are_the_empty_prompt_in_every_chunk():
    batch = objective(prompt_dropout=1.0).prepare(items(), 0, torch.device("cpu"))
    assert (batch.arguments["encoder_hidden_states"] == -1).all()


def test_a_noised_history_is_told_of_and_leaves_the_target():
    data = items()
    batch = objective(history_noise_probability=1.0, history_noise_max_timestep=100.0).prepare(
        data, 0, torch.device("cpu")
    )
    time = batch.arguments["clean_timestep"]
    assert ((time > 0) & (time < 100)).all() and (time == time[:, :1]).all()
    residue = batch.arguments["clean_hidden_states"] - (1 - time / 1000)[:, None, :, None, None] * data["latents"]
    ratio = residue.std(dim=(1, 2, 3, 4)) / (time[:, 0] / 1000)
    assert ratio.tolist() == pytest.approx([1, 1], abs=0.15)
    torch.testing.assert_close(batch.target, batch.noise - data["latents"])


def test_no_setting_changes_what_else_is_drawn():
    plain, all_on = (objective(**settings).draw(7, 0, (CHANNELS, F, 4, 4)) for settings in ({}, ALWAYS))
    assert torch.equal(plain.noise, all_on.noise) and torch.equal(plain.timestep, all_on.timestep)


def test_draws_depend_on_seed_and_sample_id_alone():
    shape = (CHANNELS, F, 4, 4)
    again, other, seed = (
        objective().draw(3, 9, shape),
        objective().draw(4, 0, shape),
        objective(seed=1).draw(3, 0, shape),
    )
    draw = objective().draw(3, 0, shape)
    assert torch.equal(draw.noise, again.noise) and torch.equal(draw.timestep, again.timestep)
    assert not torch.equal(draw.noise, other.noise) and not torch.equal(draw.noise, seed.noise)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("latents", ["whole", "own"])
def test_ranks_of_a_group_prepare_the_parts_of_the_whole(num_ranks, latents):
    data = items((5, 6))
    whole = objective(**ALWAYS).prepare(items((5, 6)), 0, torch.device("cpu"))
    parts = []
    for rank in range(num_ranks):
        if latents == "own":
            data["latents"] = FrameLayout(F, num_ranks, CHUNK).shard_latents(items((5, 6))["latents"], rank)
        parts.append(objective(num_ranks, rank, **ALWAYS).prepare(dict(data), 0, torch.device("cpu")))
    for name, expected in whole.arguments.items():
        dim = 2 if expected.ndim == 5 else 1
        assert torch.equal(torch.cat([part.arguments[name] for part in parts], dim=dim), expected), name
    assert torch.equal(torch.cat([part.target for part in parts], dim=2), whole.target)
    assert torch.equal(torch.cat([part.frame_weight for part in parts], dim=1), whole.frame_weight)


def recycler(**settings) -> ErrorRecycler:
    always = {f"error_{kind}_probability": 1.0 for kind in ("context", "latent", "noise", "update")}
    return ErrorRecycler(
        RecyclingSettings(**{**always, "error_clean_probability": 0.0, "error_warmup_steps": 1, **settings}), CHUNK
    )


def test_errors_of_warm_up_steps_come_back_in_history_latents_and_noise(monkeypatch):
    for scale in ("SMALLEST_SCALE", "LARGEST_SCALE"):
        monkeypatch.setattr(f"objectives.error_recycling.{scale}", 1.0)
    errors = recycler()
    task = objective(recycler=errors)
    data = items((0,))
    data["loss_mask"][:] = True
    first = task.prepare(data, 0, torch.device("cpu"))
    assert first.recycling[0].update and not first.recycling[0].context
    task.keep_errors(first.target + 0.5, first)  # x0 is missed by -sigma / 2, the noise by (1 - sigma) / 2
    assert len(errors.buffer) == 8

    second = task.prepare(data, 1, torch.device("cpu"))
    assert second.recycling[0].context and second.recycling[0].latent and second.recycling[0].noise
    sigma = LongLiveScheduler().sigmas_at(first.arguments["timestep"])
    history = second.arguments["clean_hidden_states"] - data["latents"]
    added = history[0, 0, ::CHUNK, 0, 0]
    allowed = (-sigma[0, ::CHUNK] / 2).tolist()
    assert all(min(abs(value - error) for error in allowed) < 1e-4 for value in added.tolist())
    # The same timesteps come again, so that latents and noise meet errors of their own bucket.
    noise_error = (1 - sigma)[0] / 2
    torch.testing.assert_close((second.noise - first.noise)[0, 0, :, 0, 0], noise_error, atol=1e-4, rtol=0)
    # The noise that is added is what is to be predicted; the error in the latents is what is to be mended.
    torch.testing.assert_close(second.target, second.noise - data["latents"])


def test_padding_and_given_images_leave_no_errors():
    errors = recycler()
    task = objective(recycler=errors, image_probability=1.0)
    batch = task.prepare(items((0,)), 0, torch.device("cpu"))  # its last chunk is padding, its first frame is given
    task.keep_errors(batch.target + 1, batch)
    assert len(errors.buffer) == 2 * (F // CHUNK - 2)


def test_plans_follow_the_probabilities():
    settings = RecyclingSettings(error_warmup_steps=0)
    plans = [ErrorRecycler(settings, CHUNK).plan(np.random.default_rng(i), 0) for i in range(4000)]
    share = {name: np.mean([vars(plan)[name] for plan in plans]) for name in ("context", "latent", "noise", "update")}
    assert share == pytest.approx({"context": 0.72, "latent": 0.72, "noise": 0.008, "update": 0.02}, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting_scheme": "cosine"}, "weighting_scheme is one of longlive, none, got 'cosine'"),
        ({"prompt_dropout": -0.1}, "prompt_dropout is a probability"),
        ({"history_noise_max_timestep": 1001.0}, r"in \[0, 1000\], got 1001.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TeacherForcingSettings(**settings)
