"""Schedulers and networks of diffusers in the pipeline: they work, or one line says why not."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)

from longlive_diffusers import LongLivePipeline, LongLiveScheduler
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


DRAWING = (FlowMatchLCMScheduler(shift=8.0), FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True))


def frames(pipe, seeds: list[int], **overrides) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments = {"prompt": ["a cat"] * len(seeds), "generator": generator, "num_frames": 13}
    return pipe(**tiny_arguments(**(arguments | overrides))).frames


@pytest.mark.parametrize("scheduler", DRAWING, ids=lambda scheduler: type(scheduler).__name__)
def test_a_seed_is_a_video_also_where_steps_draw_noise(scheduler):
    """Whatever else is drawn, and whatever is made beside it or after it."""
    pipe = tiny_pipeline()
    plain = frames(pipe, [1])
    pipe.scheduler = scheduler
    first = frames(pipe, [1, 2])
    torch.manual_seed(7)
    assert torch.equal(frames(pipe, [1, 2]), first)
    for index, seed in enumerate((1, 2)):
        torch.testing.assert_close(frames(pipe, [seed])[0], first[index], atol=1e-4, rtol=1e-4)
    longer = frames(pipe, [1], num_frames=21)
    torch.testing.assert_close(longer[:, :, :4], first[:1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first[:1], plain, atol=1e-3) and not torch.allclose(first[0], first[1], atol=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=5.0),
        FlowMatchHeunDiscreteScheduler(shift=5.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_solvers_of_flows_make_videos(scheduler):
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler
    assert frames(pipe, [1]).isfinite().all()


def test_steps_are_counted_as_the_scheduler_makes_them():
    """One of second order makes two of all but the last."""
    pipe, steps = tiny_pipeline(), []
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=5.0)

    def note(pipe, step, timestep, tensors):
        steps.append((step, pipe.num_timesteps))
        return tensors

    frames(pipe, [1], num_inference_steps=3, callback_on_step_end=note)
    assert steps == [(step, 10) for step in range(10)]


@pytest.mark.parametrize("shift", [5.0, 3.0])
@pytest.mark.parametrize(
    "assign", [setattr, lambda pipe, name, value: pipe.register_modules(**{name: value})], ids=["set", "registered"]
)
def test_wans_solver_is_replaced_where_it_is_assigned_as_where_it_is_loaded(tmp_path, caplog, assign, shift):
    """The idiom of Wan's documentation: the video is the same before and after the pipeline is saved."""
    pipe = tiny_pipeline()
    with caplog.at_level("WARNING", logger="longlive_diffusers"):
        assign(pipe, "scheduler", UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=shift))
    assert f"UniPCMultistepScheduler is replaced by LongLiveScheduler(flow_shift={shift})" in caplog.text
    assert type(pipe.scheduler) is LongLiveScheduler and pipe.scheduler.config["flow_shift"] == shift
    found = frames(pipe, [1])
    assert torch.equal(found, frames(tiny_pipeline(scheduler=LongLiveScheduler(flow_shift=shift)), [1]))
    pipe.save_pretrained(tmp_path)
    loaded = LongLivePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(frames(loaded, [1], window_size=6, sink_size=2), found)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), LCMScheduler(), EulerAncestralDiscreteScheduler()])
def test_solvers_of_other_predictions_are_refused(scheduler):
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler
    for call in (pipe, pipe.stream):
        with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} solves for prediction_type 'epsilon'"):
            call(**tiny_arguments())


@pytest.mark.parametrize("name", ["transformer", "scheduler"])
def test_what_is_missing_is_named(name):
    pipe = tiny_pipeline()
    setattr(pipe, name, None)
    for call in (pipe, pipe.stream):
        with pytest.raises(ValueError, match=f"This pipeline has no {name}, without which it makes no video"):
            call(**tiny_arguments())


def test_a_network_of_diffusers_is_refused_after_the_pipeline_is_made():
    pipe = tiny_pipeline()
    pipe.transformer = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        ffn_dim=8,
        num_layers=1,
    )
    with pytest.raises(ValueError, match=r"give the pipeline `LongLiveTransformer3DModel.from_wan\(it\)`"):
        pipe(**tiny_arguments())
