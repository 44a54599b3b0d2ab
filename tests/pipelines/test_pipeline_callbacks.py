"""Callbacks at the end of every solver step: what they are given, what they may change, and how they stop a video."""

import threading

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback

from longlive_diffusers import LongLivePipeline
from tests.support.tiny_pipeline import CHUNK_SIZE, TEXT_DIM, TEXT_LENGTH, tiny_arguments, tiny_pipeline


CHUNKS, STEPS = 2, 2  # of `tiny_arguments`


@pytest.fixture
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


def run(pipe, **overrides) -> torch.Tensor:
    return pipe(**tiny_arguments(**overrides)).frames


class Recorder:
    """A callback that changes nothing."""

    def __init__(self):
        self.steps, self.timesteps, self.inputs, self.seen = [], [], [], []

    def __call__(self, pipe, step, timestep, tensors):
        self.steps.append(step)
        self.timesteps.append(int(timestep))
        self.inputs.append({name: None if x is None else x.clone() for name, x in tensors.items()})
        self.seen.append((pipe.guidance_scale, pipe.num_timesteps, int(pipe.current_timestep), pipe.interrupt))
        return tensors


# -- what they are given ---------------------------------------------------------------------------------------------


def test_is_called_after_every_step_of_every_chunk(pipe):
    recorder = Recorder()
    expected = run(pipe)
    assert torch.equal(run(pipe, callback_on_step_end=recorder), expected)
    assert recorder.steps == [0, 1, 2, 3]
    assert recorder.timesteps[:STEPS] == recorder.timesteps[STEPS:] and recorder.timesteps[0] > recorder.timesteps[1]


def test_gets_the_latents_of_the_chunk_in_progress(pipe):
    recorder = Recorder()
    video = run(pipe, callback_on_step_end=recorder)
    latents = [inputs["latents"] for inputs in recorder.inputs]
    assert all(set(inputs) == {"latents"} for inputs in recorder.inputs)
    assert torch.equal(torch.cat([latents[1], latents[3]], dim=2), video)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_gets_every_tensor_it_may_ask_for(pipe, guidance_scale):
    recorder = Recorder()
    names = pipe._callback_tensor_inputs
    run(
        pipe,
        callback_on_step_end=recorder,
        callback_on_step_end_tensor_inputs=names,
        guidance_scale=guidance_scale,
    )
    for inputs in recorder.inputs:
        assert list(inputs) == names
        assert inputs["latents"].shape == (1, 8, CHUNK_SIZE, 4, 4)
        assert inputs["prompt_embeds"].shape == (1, TEXT_LENGTH, TEXT_DIM)
        assert (inputs["negative_prompt_embeds"] is None) == (guidance_scale == 1)


def test_asking_for_something_else_raises(pipe):
    with pytest.raises(ValueError, match="image_embeds"):
        run(pipe, callback_on_step_end=Recorder(), callback_on_step_end_tensor_inputs=["latents", "image_embeds"])


def test_sees_the_state_of_the_run(pipe):
    recorder = Recorder()
    run(pipe, callback_on_step_end=recorder, guidance_scale=2.5)
    assert [seen[:2] for seen in recorder.seen] == [(2.5, CHUNKS * STEPS)] * 4
    assert [seen[2] for seen in recorder.seen] == recorder.timesteps
    assert pipe.do_classifier_free_guidance and pipe.current_timestep is None and not pipe.interrupt


def test_steps_go_on_being_counted_where_a_video_is_continued(pipe):
    recorder = Recorder()
    run(pipe, callback_on_step_end=recorder, video_latents=run(pipe, num_frames=5))
    assert recorder.steps == [0, 1] and pipe.num_timesteps == STEPS


def test_may_return_nothing(pipe):
    assert torch.equal(run(pipe, callback_on_step_end=lambda *_: None), run(pipe))


def test_is_called_by_a_stream_too(pipe):
    recorder = Recorder()
    arguments = tiny_arguments(num_frames=None, callback_on_step_end=recorder)
    with pipe.stream(**arguments) as session:
        next(session)
        assert recorder.steps == [0, 1]
        next(session)
    assert recorder.steps == [0, 1, 2, 3]


# -- what they may change --------------------------------------------------------------------------------------------


def test_latents_it_returns_are_used(pipe):
    def empty_last(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step % STEPS == STEPS - 1 else tensors

    assert not run(pipe, callback_on_step_end=empty_last).any()


def test_an_early_change_of_latents_reaches_later_chunks_through_the_cache(pipe):
    def change_first(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] + (step == 0)}

    expected, changed = run(pipe), run(pipe, callback_on_step_end=change_first)
    assert not torch.allclose(changed[:, :, CHUNK_SIZE:], expected[:, :, CHUNK_SIZE:])


def test_the_guidance_scale_can_be_raised_at_every_step(pipe):
    def raise_guidance(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    changed = run(pipe, callback_on_step_end=raise_guidance, guidance_scale=2.0)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert not torch.allclose(changed, run(pipe, guidance_scale=2.0))


def test_a_changed_guidance_scale_does_not_outlive_the_call(pipe):
    def raise_guidance(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0

    expected = run(pipe, guidance_scale=2.0)
    run(pipe, callback_on_step_end=raise_guidance, guidance_scale=2.0)
    assert torch.equal(run(pipe, guidance_scale=2.0), expected)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
@pytest.mark.parametrize("in_place", [False, True])
def test_text_it_changes_is_used_from_then_on(pipe, name, in_place):
    def change_text(pipe, step, timestep, tensors):
        if step == 0 and in_place:
            tensors[name].mul_(-2.0)
        elif step == 0:
            return {name: -2.0 * tensors[name]}
        return tensors

    arguments = {"guidance_scale": 2.0, "negative_prompt": "snow", "num_frames": 5}
    recorder = Recorder()
    expected = run(pipe, callback_on_step_end=recorder, **arguments)
    changed = run(
        pipe, callback_on_step_end=change_text, callback_on_step_end_tensor_inputs=["latents", name], **arguments
    )
    assert not torch.allclose(changed, expected)
    last_only = run(
        pipe,
        callback_on_step_end=lambda p, step, t, x: {name: -2.0 * x[name]} if step == STEPS - 1 else x,
        callback_on_step_end_tensor_inputs=["latents", name],
        **arguments,
    )
    assert torch.equal(last_only, expected), "after the last step, only the cache is left to be written"


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_so_is_text_that_it_changes_in_place_in_inference_mode(pipe, name):
    """There, tensors do not count their changes."""

    def change_text(pipe, step, timestep, tensors):
        if step == 0:
            tensors[name].mul_(-2.0)
        return tensors

    arguments = {"guidance_scale": 2.0, "negative_prompt": "snow", "num_frames": 5}
    arguments |= {"callback_on_step_end": change_text, "callback_on_step_end_tensor_inputs": ["latents", name]}
    expected = run(pipe, **arguments)
    with torch.inference_mode():
        found = run(pipe, **arguments)
    assert torch.equal(found, expected)


class HalvedLatents(PipelineCallback):
    """A callback as a library of callbacks would define it."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        callback_kwargs["latents"] = callback_kwargs["latents"] / 2
        return callback_kwargs


def test_a_pipeline_callback_names_its_own_inputs(pipe):
    expected = run(pipe, callback_on_step_end=lambda p, step, t, x: {"latents": x["latents"] / 2})
    found = run(pipe, callback_on_step_end=HalvedLatents(), callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert torch.equal(found, expected)


def test_several_pipeline_callbacks_run_in_order(pipe):
    expected = run(pipe, callback_on_step_end=lambda p, step, t, x: {"latents": x["latents"] / 4})
    both = MultiPipelineCallbacks([HalvedLatents(), HalvedLatents()])
    assert torch.equal(run(pipe, callback_on_step_end=both), expected)


def test_diffusers_own_cutoff_of_guidance_works(pipe):
    """After step 2, the first chunk's last, guidance is off: the second chunk follows the prompt alone."""
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=STEPS - 1)
    found = run(pipe, callback_on_step_end=cutoff, guidance_scale=3.0)
    assert pipe.guidance_scale == 0 and not pipe.do_classifier_free_guidance
    guided, first = run(pipe, guidance_scale=3.0), run(pipe, guidance_scale=3.0, num_frames=5)
    assert torch.equal(found[:, :, :CHUNK_SIZE], guided[:, :, :CHUNK_SIZE])

    generator = torch.Generator().manual_seed(0)
    _, noise_of_second = (torch.randn(1, 8, CHUNK_SIZE, 4, 4, generator=generator) for _ in range(2))
    continued = run(pipe, video_latents=first, latents=noise_of_second)
    torch.testing.assert_close(found[:, :, CHUNK_SIZE:], continued[:, :, CHUNK_SIZE:], atol=1e-5, rtol=1e-5)


# -- what they may not do --------------------------------------------------------------------------------------------

BAD_RETURNS = {
    "a number": (7, "a dict of tensors, or None, got int"),
    "a list": ([1], "a dict of tensors, or None, got list"),
    "a tensor": (torch.zeros(1), "a dict of tensors, or None, got Tensor"),
    "a misspelled name": ({"latent": torch.zeros(1)}, r"may return tensors of .*'latents'.*, got \['latent'\]"),
    "no latents": ({"latents": None}, "`latents` as a tensor, got NoneType"),
    "an array": ({"latents": torch.zeros(1, 8, 2, 4, 4).numpy()}, "`latents` as a tensor, got ndarray"),
    "latents without a frame": ({"latents": torch.zeros(1, 8, 1, 4, 4)}, r"\[1, 8, 2, 4, 4\], got \[1, 8, 1, 4, 4\]"),
    "latents of another batch": ({"latents": torch.zeros(2, 8, 2, 4, 4)}, r"got \[2, 8, 2, 4, 4\]"),
    "prompts of another width": ({"prompt_embeds": torch.zeros(1, 8, 17)}, r"\[1, 8, 16\], got \[1, 8, 17\]"),
    "prompts of no tokens": ({"prompt_embeds": torch.zeros(1, 0, 16)}, r"\[1, 8, 16\], got \[1, 0, 16\]"),
    "latents that are not numbers": (
        {"latents": torch.full((1, 8, 2, 4, 4), float("nan"))},
        "What a callback returned as `latents` has 256 values that are not finite",
    ),
    "an infinite prompt": (
        {"prompt_embeds": torch.full((1, 1, 16), float("inf"))},
        "What a callback returned as `prompt_embeds` has 16 values that are not finite",
    ),
    "latents of integers": ({"latents": torch.zeros(1, 8, 2, 4, 4).int()}, "must hold floats .*, got torch.int32"),
    "a flat prompt": ({"prompt_embeds": torch.zeros(8, 16)}, r"\[1, 8, 16\], got \[8, 16\]"),
    "a negative prompt without guidance": (
        {"negative_prompt_embeds": torch.zeros(1, 8, 16)},
        "`negative_prompt_embeds`, but without guidance there is none",
    ),
}


@pytest.mark.parametrize(("returned", "message"), BAD_RETURNS.values(), ids=BAD_RETURNS)
def test_what_they_return_is_checked(pipe, returned, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, callback_on_step_end=lambda *_: returned)


@pytest.mark.parametrize("output_type", ["np", "uint8", "pt", "pil", "latent"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_they_spoil_in_place_does_not_become_a_video(pipe, output_type, value):
    def spoil(pipe, step, timestep, tensors):
        if step == 2:  # in the second chunk
            tensors["latents"][0, 0, 0, 0, 0] = value

    with pipe.stream(**tiny_arguments(output_type=output_type, callback_on_step_end=spoil)) as session:
        assert next(session).index == 0
        with pytest.raises(ValueError, match="A chunk came out with values that are not numbers: a callback"):
            next(session)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_guidance_scale", float("nan"), "`guidance_scale` must be a finite number of at least 0, got nan"),
        ("_guidance_scale", None, "`guidance_scale` must be a finite number of at least 0, got None"),
        ("_guidance_scale", 1e30, "`guidance_scale` must be at most"),
        ("_attention_kwargs", {"scale": float("nan")}, "'scale' of `attention_kwargs` must be a finite number"),
        ("_attention_kwargs", 0.5, "`attention_kwargs` must be a dict"),
    ],
)
def test_what_they_write_is_checked(pipe, name, value, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, callback_on_step_end=lambda pipe, *_: setattr(pipe, name, value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_latents_of_another_dtype_are_converted(pipe, dtype):
    video = run(pipe, callback_on_step_end=lambda p, s, t, tensors: {"latents": tensors["latents"].to(dtype)})
    assert video.dtype == torch.float32 and video.isfinite().all()


def test_a_prompt_may_have_another_number_of_tokens(pipe):
    longer = torch.randn(1, 11, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    changed = run(pipe, callback_on_step_end=lambda *_: {"prompt_embeds": longer})
    assert not torch.equal(changed, run(pipe))


def test_one_name_of_a_tensor_need_not_be_a_list(pipe):
    recorder = Recorder()
    run(pipe, callback_on_step_end=recorder, callback_on_step_end_tensor_inputs="prompt_embeds")
    assert [list(inputs) for inputs in recorder.inputs] == [["prompt_embeds"]] * 4


# -- interrupting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_to_stop", [0, 1, 2])
def test_a_callback_interrupts_the_video(pipe, step_to_stop):
    recorder = Recorder()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == step_to_stop
        return recorder(pipe, step, timestep, tensors)

    video = run(pipe, callback_on_step_end=stop, num_frames=37)
    assert recorder.steps == list(range(step_to_stop + 1))
    assert video.shape[2] == CHUNK_SIZE * (1 + step_to_stop // STEPS), "the chunk in progress is the last"
    assert torch.equal(video[:, :, -CHUNK_SIZE:], recorder.inputs[-1]["latents"])


def test_an_interruption_does_not_outlive_the_call(pipe):
    def stop(pipe, *_):
        pipe._interrupt = True

    expected = run(pipe)
    run(pipe, callback_on_step_end=stop)
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_another_thread_interrupts_a_stream(pipe, asynchronous):
    arguments = tiny_arguments(num_frames=None, output_type="np")
    with pipe.stream(**arguments, async_decode=asynchronous) as session:
        next(session)
        thread = threading.Thread(target=setattr, args=(pipe, "_interrupt", True))
        thread.start()
        thread.join()
        remaining = list(session)
    assert len(remaining) <= 3, "at most what was in progress or had been made ahead"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_in_a_callback_reaches_the_caller(pipe, asynchronous):
    def fail(*_):
        raise RuntimeError("the callback's own")

    with (
        pytest.raises(RuntimeError, match="the callback's own"),
        pipe.stream(**tiny_arguments(callback_on_step_end=fail), async_decode=asynchronous) as session,
    ):
        next(session)
    assert session.kv_cache_bytes == 0
