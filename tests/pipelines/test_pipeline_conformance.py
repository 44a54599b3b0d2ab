"""LongLivePipeline behaves as every pipeline of diffusers does: its call, its outputs, its batches, its text.

diffusers tests its pipelines with mixins that it does not ship; the test_pipeline_*.py files here state the same
behaviors for ours. Of the behaviors that those mixins know, these are not here, because:

    num_images_per_prompt       a pipeline for video has `num_videos_per_prompt`; that is tested.
    callback, last step only    setting the latents to zero in the last step of all empties only the last chunk, since
                                those before it are finished; the test does it in the last step of every chunk.
    attention slicing           diffusers has no slicing for attention processors of this kind, and Wan's own pipelines
                                have none either.
    xformers, freeu, IP adapter are not offered by Wan's pipelines and not by ours.
    device_map="balanced"       needs several GPUs; `device_map="cpu"` is tested, and offloading in
                                test_pipeline_offload.py.
    quantized components        are the transformer's affair (tests/nvfp4), and diffusers' own.
    PipelineQuantizationConfig  likewise.
    single files                LongLive's published files are read by `from_original`; tests/loaders covers it.
    float16 on a GPU against    needs a GPU; finite results in both half dtypes are tested on the CPU, and saving and
    float32 at 1e-2             loading in them.
"""

import inspect

import numpy as np
import PIL.Image
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from longlive_diffusers import LongLivePipeline, LongLivePipelineOutput
from tests.support.nvfp4_models import small_pipeline
from tests.support.tiny_pipeline import TEXT_DIM, TEXT_LENGTH, tiny_arguments, tiny_pipeline, tiny_transformer
from tests.support.tiny_vae import tiny_vae


PROMPT = "a cat runs on the grass"
TEXT_COMPONENTS = {"tokenizer": None, "text_encoder": None}
OTHER_COMPONENTS = {"vae": None, "transformer": None, "scheduler": None}


@pytest.fixture
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


def run(pipe, **overrides):
    return pipe(**tiny_arguments(**overrides)).frames


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# -- the call and what it returns ------------------------------------------------------------------------------------


def test_the_call_has_the_arguments_of_diffusers_with_defaults():
    parameters = inspect.signature(LongLivePipeline.__call__).parameters
    required = {
        "prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale",
        "num_videos_per_prompt", "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type",
        "return_dict", "attention_kwargs", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
        "max_sequence_length",
    }  # fmt: skip
    assert required <= set(parameters)
    assert all(parameters[name].default is not inspect.Parameter.empty for name in required)


def test_stream_takes_what_the_call_takes():
    call, stream = (set(inspect.signature(f).parameters) for f in (LongLivePipeline.__call__, LongLivePipeline.stream))
    assert call - stream == {"return_dict"}
    assert stream - call == {"async_decode", "split_first_chunk"}


@pytest.mark.parametrize("num_frames", [5, 13])
def test_output_type_np(pipe, num_frames):
    frames = run(pipe, output_type="np", num_frames=num_frames)
    assert isinstance(frames, np.ndarray) and frames.dtype == np.float32
    assert frames.shape == (1, num_frames, 64, 64, 3)
    assert frames.min() >= 0 and frames.max() <= 1


def test_output_type_pt(pipe):
    frames = run(pipe, output_type="pt")
    assert frames.shape == (1, 13, 3, 64, 64)
    np.testing.assert_allclose(frames.permute(0, 1, 3, 4, 2).numpy(), run(pipe, output_type="np"))


def test_output_type_pil(pipe):
    (video,) = run(pipe, output_type="pil")
    assert len(video) == 13 and all(isinstance(image, PIL.Image.Image) and image.size == (64, 64) for image in video)
    expected = (run(pipe, output_type="np")[0] * 255).round()
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in video]), expected)


def test_output_type_latent(pipe):
    latents = run(pipe, output_type="latent")
    assert latents.shape == (1, 8, 4, 4, 4) and latents.dtype == torch.float32
    np.testing.assert_array_equal(pipe.decode_latents(latents), run(pipe, output_type="np"))


@pytest.mark.parametrize(("height", "width"), [(32, 96), (96, 64)])
def test_height_and_width_are_pixels(pipe, height, width):
    assert run(pipe, output_type="np", num_frames=5, height=height, width=width).shape == (1, 5, height, width, 3)


def test_dict_and_tuple_hold_the_same(pipe):
    result = pipe(**tiny_arguments())
    assert isinstance(result, LongLivePipelineOutput)
    (frames,) = pipe(**tiny_arguments(), return_dict=False)
    assert torch.equal(frames, result.frames) and torch.equal(frames, result[0])


def test_the_same_seed_gives_the_same_video(pipe):
    assert torch.equal(run(pipe), run(pipe))
    assert not torch.allclose(run(pipe), run(pipe, generator=generators(1)[0]))


def test_progress_can_be_switched_off(pipe, capfd):
    run(pipe)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    run(pipe)
    assert "2/2" in capfd.readouterr().err


def test_works_in_inference_mode(pipe):
    expected = run(pipe, output_type="np", guidance_scale=2.0)
    with torch.inference_mode():
        np.testing.assert_array_equal(run(pipe, output_type="np", guidance_scale=2.0), expected)


@pytest.mark.parametrize("kv_cache_dtype", [None, "fp8", "nvfp4", "fp8_attention"])
def test_a_stream_goes_in_and_out_of_inference_mode(kv_cache_dtype):
    pipe, videos = small_pipeline(), []
    for is_within in ([False] * 4, [True, False, True, False]):
        arguments = tiny_arguments(num_frames=None, kv_cache_dtype=kv_cache_dtype, relative_rope=True)
        with torch.inference_mode(is_within[0]):
            session = pipe.stream(**arguments)
        chunks = []
        for mode in is_within:
            with torch.inference_mode(mode):
                chunks.append(next(session).frames)
            session.prompt = f"another prompt {len(chunks)}"
        session.close()
        videos.append(torch.cat(chunks, dim=2))
    assert torch.equal(*videos)


# -- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(pipe):
    prompts = ["a", "a cat runs on the grass", "the dog sleeps in snow . the fox runs"]
    batch = run(pipe, prompt=prompts, generator=generators(0, 1, 2), output_type="np")
    assert batch.shape == (3, 13, 64, 64, 3)
    for number, prompt in enumerate(prompts):
        alone = run(pipe, prompt=prompt, generator=generators(number)[0], output_type="np")
        np.testing.assert_allclose(batch[number], alone[0], atol=1e-4)


def test_a_batch_of_one_is_a_single_video(pipe):
    single = run(pipe)
    assert torch.equal(run(pipe, prompt=[PROMPT]), single)
    assert torch.equal(run(pipe, prompt=[PROMPT], generator=generators(0)), single)


@pytest.mark.parametrize("prompts", [PROMPT, [PROMPT], [PROMPT, "a dog"]], ids=["string", "one", "two"])
@pytest.mark.parametrize("num_videos", [1, 2])
def test_num_videos_per_prompt(pipe, prompts, num_videos):
    batch = 1 if isinstance(prompts, str) else len(prompts)
    frames = run(pipe, prompt=prompts, num_videos_per_prompt=num_videos)
    assert frames.shape[0] == batch * num_videos
    assert len({tensor.numpy().tobytes() for tensor in frames}) == batch * num_videos, "each from its own noise"


def test_the_videos_of_a_prompt_stand_next_to_each_other(pipe):
    frames = run(pipe, prompt=["a cat", "a dog"], num_videos_per_prompt=2, generator=generators(0, 1, 2, 3))
    for number, prompt in enumerate(["a cat", "a cat", "a dog", "a dog"]):
        alone = run(pipe, prompt=prompt, generator=generators(number)[0])
        torch.testing.assert_close(frames[number], alone[0], atol=1e-5, rtol=1e-5)


def test_guidance_changes_the_video_and_not_its_shape(pipe):
    without, guided = run(pipe, guidance_scale=1.0), run(pipe, guidance_scale=3.0)
    assert guided.shape == without.shape and not torch.allclose(guided, without)
    assert not torch.allclose(run(pipe, guidance_scale=3.0, negative_prompt="snow"), guided)


def test_guidance_towards_the_prompt_itself_changes_nothing(pipe):
    guided = run(pipe, guidance_scale=3.0, negative_prompt=PROMPT)
    torch.testing.assert_close(guided, run(pipe), atol=1e-4, rtol=1e-4)


def test_a_guidance_of_zero_is_none(pipe):
    """diffusers' way to say that a distilled model runs without guidance."""
    assert torch.equal(run(pipe, guidance_scale=0.0), run(pipe))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_given_latents_are_the_initial_noise(pipe, guidance_scale):
    noise = torch.randn(1, 8, 4, 4, 4, generator=generators(0)[0])
    frames = run(pipe, latents=noise, guidance_scale=guidance_scale, num_frames=125)
    assert frames.shape == noise.shape
    assert torch.equal(run(pipe, latents=noise, guidance_scale=guidance_scale, generator=generators(9)[0]), frames)


# -- text by itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("num_videos", [1, 2])
def test_text_is_encoded_without_the_other_components_and_the_rest_runs_without_it(pipe, guidance_scale, num_videos):
    expected = run(pipe, guidance_scale=guidance_scale, negative_prompt="snow", num_videos_per_prompt=num_videos)
    with torch.no_grad():
        prompt_embeds, negative_prompt_embeds = tiny_pipeline(**OTHER_COMPONENTS).encode_prompt(
            PROMPT, "snow", do_classifier_free_guidance=guidance_scale > 1, max_sequence_length=TEXT_LENGTH
        )
    assert prompt_embeds.shape == (1, TEXT_LENGTH, TEXT_DIM)
    assert (negative_prompt_embeds is None) == (guidance_scale == 1)
    found = run(
        tiny_pipeline(**TEXT_COMPONENTS),
        prompt=None,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        guidance_scale=guidance_scale,
        num_videos_per_prompt=num_videos,
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_names_that_encode_prompt_returns_are_those_of_the_call():
    source = inspect.getsource(LongLivePipeline.encode_prompt)
    assert source.rstrip().endswith("return prompt_embeds, negative_prompt_embeds")


def test_prompts_are_padded_with_zeros(pipe):
    embeds, _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    assert embeds[0, 0].any() and not embeds[0, 4:].any()


def test_embeddings_are_repeated_for_the_videos_of_a_prompt(pipe):
    embeds, negative = pipe.encode_prompt(["a", "cat"], num_videos_per_prompt=2, max_sequence_length=TEXT_LENGTH)
    assert embeds.shape == negative.shape == (4, TEXT_LENGTH, TEXT_DIM)
    assert torch.equal(embeds[0], embeds[1]) and not torch.equal(embeds[1], embeds[2])


def test_latents_need_no_vae(pipe):
    assert torch.equal(run(tiny_pipeline(vae=None)), run(pipe))


# -- compiled and sped up --------------------------------------------------------------------------------------------


def test_a_compiled_network_makes_the_same_video_with_few_graphs():
    """With guidance; tests/models/test_transformer_compile.py has streams without."""
    pipe = tiny_pipeline(transformer=tiny_transformer(num_layers=1))
    arguments = {"num_frames": 37, "guidance_scale": 2.0}
    expected = run(pipe, **arguments)
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe.transformer.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(pipe, **arguments), expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 5, "text to project, text known, a growing window, a full one"


def test_the_vae_may_slice_and_tile(pipe):
    expected = run(pipe, output_type="np", prompt=["a cat", "a dog"], generator=generators(0, 1))
    pipe.vae.enable_slicing()
    found = run(pipe, output_type="np", prompt=["a cat", "a dog"], generator=generators(0, 1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    tiled = tiny_pipeline(vae=tiny_vae())
    tiled.vae.enable_tiling(32, 32, 16, 16)
    latents = run(tiled)
    whole = tiled.vae.decode(latents, return_dict=False)[0]
    assert tiled.decode_latents(latents, "pt").shape[1] == whole.shape[2]
