"""Whatever is malformed is one ValueError that states the numbers, before any network has run."""

import re
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderTiny

from longlive_diffusers import LongLivePipeline, LongLiveScheduler
from tests.support.checks import assert_raises
from tests.support.tiny_pipeline import TEXT_DIM, TEXT_LENGTH, tiny_arguments, tiny_pipeline
from tests.support.tiny_vae import tiny_vae


IMAGE = PIL.Image.new("RGB", (64, 64))
NAN, INFINITY = float("nan"), float("inf")


def latents(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = NAN
    return tensor


def embeds(batch: int = 1, dim: int = TEXT_DIM) -> torch.Tensor:
    return torch.zeros(batch, TEXT_LENGTH, dim)


# What is wrong: the arguments that replace those of `tiny_arguments`, and what the message has to say.
BAD_CALLS = {
    # prompts
    "no prompt": ({"prompt": None}, ["prompt", "none"]),
    "two kinds of prompts": ({"shot_prompts": ["a"]}, ["'prompt'", "'shot_prompts'"]),
    "prompt and embeddings": ({"prompt_embeds": embeds()}, ["'prompt'", "'prompt_embeds'"]),
    "a number as prompt": ({"prompt": 7}, ["`prompt`", "7"]),
    "no prompts": ({"prompt": []}, ["`prompt`", "[]"]),
    "a number among prompts": ({"prompt": ["a", 7]}, ["`prompt`", "7"]),
    "no shots": ({"prompt": None, "shot_prompts": []}, ["`shot_prompts`", "[]"]),
    "a string as shots": ({"prompt": None, "shot_prompts": "a"}, ["`shot_prompts`", "'a'"]),
    "shots and lists of shots": ({"prompt": None, "shot_prompts": [["a"], "b"]}, ["`shot_prompts`", "'b'"]),
    "lists of shots and shots": ({"prompt": None, "shot_prompts": ["a", ["b"]]}, ["`shot_prompts`", "['b']"]),
    "an empty list of shots": ({"prompt": None, "shot_prompts": [["a"], []]}, ["`shot_prompts`", "[]"]),
    # durations
    "durations without shots": ({"chunks_per_shot": 2}, ["`chunks_per_shot`", "`shot_prompts`"]),
    "too many durations": (
        {"prompt": None, "shot_prompts": ["a", "b"], "chunks_per_shot": [1, 2, 3]},
        ["2", "[1, 2, 3]"],
    ),
    "no duration": ({"prompt": None, "shot_prompts": ["a", "b"], "chunks_per_shot": 0}, ["0"]),
    "a negative duration": ({"prompt": None, "shot_prompts": ["a", "b"], "chunks_per_shot": [1, -3]}, ["-3"]),
    "half a chunk": ({"prompt": None, "shot_prompts": ["a", "b"], "chunks_per_shot": [1, 1.5]}, ["1.5"]),
    "a truth as duration": ({"prompt": None, "shot_prompts": ["a", "b"], "chunks_per_shot": [1, True]}, ["True"]),
    "durations of another batch": (
        {"prompt": None, "shot_prompts": [["a"], ["b"]], "chunks_per_shot": [[1], [1], [1]]},
        ["3", "2"],
    ),
    # negative prompts
    "too few negative prompts": ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, ["2", "3"]),
    "a number as negative prompt": ({"negative_prompt": 7}, ["`negative_prompt`", "int"]),
    "two kinds of negative prompts": (
        {"negative_prompt": "x", "negative_prompt_embeds": embeds()},
        ["`negative_prompt`", "`negative_prompt_embeds`"],
    ),
    # embeddings
    "flat embeddings": ({"prompt": None, "prompt_embeds": torch.zeros(8, 16)}, ["`prompt_embeds`", "(8, 16)"]),
    "an array of embeddings": (
        {"prompt": None, "prompt_embeds": np.zeros((1, 8, 16))},
        ["`prompt_embeds`", "ndarray"],
    ),
    "embeddings of nothing": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 0, 16)},
        ["`prompt_embeds`", "(1, 0, 16)"],
    ),
    "embeddings of another encoder": (
        {"prompt": None, "prompt_embeds": embeds(dim=17)},
        ["`prompt_embeds`", "17", "16"],
    ),
    "embeddings that are no numbers": (
        {"prompt": None, "prompt_embeds": with_nan(embeds())},
        ["`prompt_embeds`", "1 value"],
    ),
    "negative embeddings of another encoder": (
        {"negative_prompt_embeds": embeds(dim=17), "guidance_scale": 2.0},
        ["`negative_prompt_embeds`", "17", "16"],
    ),
    "too many negative embeddings": (
        {"negative_prompt_embeds": embeds(3), "guidance_scale": 2.0},
        ["`negative_prompt_embeds`", "3", "1"],
    ),
    # sizes
    "a height that does not divide": ({"height": 72}, ["`height`", "32", "72"]),
    "a width that does not divide": ({"width": 80}, ["`width`", "32", "80"]),
    "no height": ({"height": 0}, ["`height`", "0"]),
    "a negative width": ({"width": -64}, ["`width`", "-64"]),
    **{
        f"{value!r} as height": ({"height": value}, ["`height`", "an integer", "32", "16384", repr(value)])
        for value in (64.0, True, NAN, "64", 10**6, 16416, 32 * 10**12)
    },
    "a width beyond 64 bits": ({"width": 32 * 10**25}, ["`width`", "16384", 32 * 10**25]),
    # initial noise
    "noise of other channels": ({"latents": latents(1, 7, 4, 4, 4)}, ["`latents`", "8", "(1, 7, 4, 4, 4)"]),
    "noise of half chunks": ({"latents": latents(1, 8, 3, 4, 4)}, ["`latents`", "2", "3"]),
    "no noise": ({"latents": latents(1, 8, 0, 4, 4)}, ["`latents`", "0"]),
    "noise of one image": ({"latents": latents(1, 8, 4, 4)}, ["`latents`", "(1, 8, 4, 4)"]),
    "noise that is no numbers": ({"latents": with_nan(latents(1, 8, 2, 4, 4))}, ["`latents`", "1 value"]),
    "noise as an array": ({"latents": np.zeros((1, 8, 2, 4, 4))}, ["`latents`", "ndarray"]),
    "noise of another size": ({"latents": latents(1, 8, 2, 4, 4), "height": 96}, ["4x4", "64x64", "96x64"]),
    "noise that makes no patches": ({"latents": latents(1, 8, 2, 5, 4)}, ["5x4", "2x2"]),
    "noise of another batch": (
        {"latents": latents(2, 8, 2, 4, 4), "prompt": ["a", "b", "c"]},
        ["`latents`", "2", "3"],
    ),
    # conditions
    "an image and a video": ({"image": IMAGE, "video": [IMAGE] * 5}, ["'image'", "'video'"]),
    "two kinds of latents": (
        {"image_latents": latents(1, 8, 1, 4, 4), "video_latents": latents(1, 8, 2, 4, 4)},
        ["'image_latents'", "'video_latents'"],
    ),
    "two images for one video": ({"image_latents": latents(1, 8, 2, 4, 4)}, ["`image_latents`", "1", "2"]),
    "a video of half chunks": ({"video_latents": latents(1, 8, 3, 4, 4)}, ["`video_latents`", "2", "3"]),
    "latents of two sizes": (
        {"latents": latents(1, 8, 2, 4, 4), "image_latents": latents(1, 8, 1, 6, 4)},
        ["(4, 4)", "(6, 4)"],
    ),
    "a video of another batch": (
        {"video_latents": latents(2, 8, 2, 4, 4), "prompt": ["a", "b", "c"]},
        ["`video_latents`", "2", "3"],
    ),
    "image latents that are no numbers": (
        {"image_latents": with_nan(latents(1, 8, 1, 4, 4))},
        ["`image_latents`", "1"],
    ),
    "a path as image": ({"image": "cat.png"}, ["`image`", "str"]),
    "no images": ({"image": []}, ["`image`", "empty"]),
    "an image of four channels": ({"image": np.zeros((64, 64, 4))}, ["`image`", "(64, 64, 4)"]),
    "an image that is no numbers": ({"image": np.full((64, 64, 3), NAN)}, ["`image`", "finite"]),
    "images of another batch": ({"image": [IMAGE, IMAGE], "prompt": ["a", "b", "c"]}, ["`image`", "2", "3"]),
    "a video that is too short": ({"video": [IMAGE] * 4}, ["`video`", "4", "5"]),
    "videos of two lengths": ({"video": [[IMAGE] * 5, [IMAGE] * 13], "prompt": ["a", "b"]}, ["5", "13"]),
    "no video": ({"video": []}, ["`video`", "empty"]),
    "a video in a folder": ({"video": ["frame0.png"]}, ["`video`", "str"]),
    # length
    "no frames": ({"num_frames": 0}, ["`num_frames`", "0"]),
    "negative frames": ({"num_frames": -5}, ["`num_frames`", "-5"]),
    "more frames than have a position": ({"num_frames": 10**400}, ["`num_frames`", str(2**53), "1" + "0" * 400]),
    **{
        f"{value!r} as frames": ({"num_frames": value}, ["`num_frames`", "an integer of at least 1", repr(value)])
        for value in (12.5, 13.0, True, NAN, "13")
    },
    "nothing to add to a video": ({"video_latents": latents(1, 8, 4, 4, 4), "num_frames": 13}, ["13"]),
    # options
    "no steps": ({"num_inference_steps": 0}, ["`num_inference_steps`", "0"]),
    "fractional steps": ({"num_inference_steps": 2.5}, ["`num_inference_steps`", "2.5"]),
    "more steps than timesteps": ({"num_inference_steps": 1001}, ["`num_inference_steps`", "1000", "1001"]),
    "a billion steps": ({"num_inference_steps": 10**9}, ["`num_inference_steps`", "1000", "1000000000"]),
    "guidance that overflows": ({"guidance_scale": 1e300}, ["`guidance_scale`", "1000", "1e+300"]),
    "guidance beyond the limit": ({"guidance_scale": 1001}, ["`guidance_scale`", "1000", "1001"]),
    "guidance beyond float64": ({"guidance_scale": 10**400}, ["`guidance_scale`", "1" + "0" * 400]),
    "guidance that is no number": ({"guidance_scale": NAN}, ["`guidance_scale`", "nan"]),
    "negative guidance": ({"guidance_scale": -1.0}, ["`guidance_scale`", "-1.0"]),
    "guidance in words": ({"guidance_scale": "high"}, ["`guidance_scale`", "'high'"]),
    "no videos": ({"num_videos_per_prompt": 0}, ["`num_videos_per_prompt`", "0"]),
    "no tokens": ({"max_sequence_length": 0}, ["`max_sequence_length`", "0"]),
    "too few generators": ({"prompt": ["a", "b"], "generator": [torch.Generator()]}, ["`generator`", "1", "2"]),
    "too many generators": ({"generator": [torch.Generator()] * 3}, ["`generator`", "3", "1"]),
    "generators for prompts, not videos": (
        {"prompt": ["a", "b"], "num_videos_per_prompt": 2, "generator": [torch.Generator()] * 2},
        ["`generator`", "2", "4"],
    ),
    "a seed as generator": ({"generator": 42}, ["`generator`", "int"]),
    "an unknown output": ({"output_type": "mp4"}, ["`output_type`", "'mp4'"]),
    "an unknown callback input": (
        {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
        ["'noise'", "prompt_embeds"],
    ),
    "a callback input that is a number": (
        {"callback_on_step_end_tensor_inputs": 7},
        ["`callback_on_step_end_tensor_inputs`", "7"],
    ),
    "an unknown callback input as a string": (
        {"callback_on_step_end_tensor_inputs": "latent"},
        ["'latent'", "prompt_embeds"],
    ),
    "a number as callback": ({"callback_on_step_end": 7}, ["`callback_on_step_end`", "7"]),
    "the name of a callback": ({"callback_on_step_end": "print"}, ["`callback_on_step_end`", "'print'"]),
    "callbacks in a list": ({"callback_on_step_end": [print]}, ["`callback_on_step_end`", "built-in function print"]),
    "attention arguments that nobody reads": (
        {"attention_kwargs": {"scale": 1.0, "lora_scale": 0.5}},
        ["`attention_kwargs`", "'scale'", "['lora_scale']"],
    ),
    **{
        f"{value!r} as the scale of the LoRA": ({"attention_kwargs": {"scale": value}}, ["'scale'", repr(value)])
        for value in (NAN, INFINITY, -INFINITY, "x", None, True, [1.0])
    },
    "attention arguments as a list": ({"attention_kwargs": [1.0]}, ["`attention_kwargs`", "list"]),
    "a cache of integers": ({"kv_cache_dtype": torch.int8}, ["KV cache", "torch.int8"]),
    "a cache in 4 bits for heads of 12 channels": ({"kv_cache_dtype": "nvfp4"}, ["NVFP4", "16", "12"]),
    # windows
    "a window that is too small": ({"window_size": 5}, ["`window_size`", "5", "6"]),
    "no window": ({"window_size": 0}, ["`window_size`", "0"]),
    "half a chunk of sink": ({"sink_size": 3, "window_size": 12}, ["`sink_size`", "2", "3"]),
    "a negative sink": ({"sink_size": -2}, ["`sink_size`", "-2"]),
    "a fractional window": ({"window_size": 6.5}, ["`window_size`", "6.5"]),
    "a shot offset beyond exact angles": (
        {"multi_shot_rope_offset": 1e300},
        ["`multi_shot_rope_offset`", "1e+09", "1e+300"],
    ),
    "a window in words": ({"window_size": "32"}, ["`window_size`", "32"]),
    "a truth as sink": ({"sink_size": True}, ["`sink_size`", "True"]),
    "an endless shot offset": ({"multi_shot_rope_offset": INFINITY}, ["`multi_shot_rope_offset`", "inf"]),
}


@pytest.fixture(scope="module")
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


@pytest.fixture
def forwards(pipe):
    """The models that ran."""
    ran: list[str] = []
    hooks = [
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name in ("transformer", "text_encoder")
    ]
    hooks += [
        part.register_forward_pre_hook(lambda *_: ran.append("vae")) for part in (pipe.vae.encoder, pipe.vae.decoder)
    ]
    yield ran
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("overrides", "numbers"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_refuses(pipe, forwards, overrides, numbers):
    assert_raises(lambda: pipe(**tiny_arguments(**overrides)), *numbers)
    assert forwards == []


@pytest.mark.parametrize(("overrides", "numbers"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_stream_refuses_before_its_first_chunk(pipe, forwards, overrides, numbers):
    assert_raises(lambda: pipe.stream(**tiny_arguments(**overrides)), *numbers)
    assert forwards == []


def test_a_call_has_an_end(pipe, forwards):
    assert_raises(lambda: pipe(**tiny_arguments(num_frames=None)), "`num_frames`", "pipe.stream")
    assert forwards == []


def test_an_endless_stream_of_several_shots_needs_durations(pipe, forwards):
    arguments = tiny_arguments(prompt=None, shot_prompts=["a", "b", "c"], num_frames=None)
    assert_raises(lambda: pipe.stream(**arguments), "3", "`chunks_per_shot`")
    assert forwards == []


TOO_LARGE = {
    "a window of a billion frames": ({"window_size": 10**9, "num_frames": None}, ["1000000000 latent frames"]),
    "a window beyond all bits": ({"window_size": 10**400, "num_frames": None}, ["`window_size`"]),
    "sinks of a billion frames": ({"sink_size": 10**9, "window_size": 3 * 10**9, "num_frames": None}, ["3000000000"]),
    "a billion videos": ({"num_videos_per_prompt": 10**9}, ["1000000000 x 4 latent frames"]),
}


@pytest.mark.parametrize(("overrides", "numbers"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_does_not_fit_into_memory_is_refused_before_it_is_allocated(pipe, forwards, overrides, numbers):
    arguments = tiny_arguments(**overrides)
    with pytest.raises(ValueError, match=r"KV cache of .* needs .* GiB; .* GiB are available.*smaller") as raised:
        pipe.stream(**arguments)
    assert all(number in str(raised.value) for number in numbers)
    assert forwards == []


def test_more_tokens_than_the_tokenizer_takes_are_refused_but_for_the_default(pipe, forwards, monkeypatch):
    monkeypatch.setattr(pipe.tokenizer, "model_max_length", TEXT_LENGTH)
    for length in (TEXT_LENGTH + 1, 511, 513, 10**9):
        numbers = ["`max_sequence_length`", TEXT_LENGTH, length]
        assert_raises(lambda length=length: pipe(**tiny_arguments(max_sequence_length=length)), *numbers)
        assert_raises(lambda length=length: pipe.stream(**tiny_arguments(max_sequence_length=length)), *numbers)
        assert_raises(lambda length=length: pipe.encode_prompt("a", max_sequence_length=length), *numbers)
    assert forwards == []
    for options in ({}, {"max_sequence_length": 512}, {"max_sequence_length": TEXT_LENGTH}):
        assert pipe.encode_prompt("a", **options)[0].shape == (1, TEXT_LENGTH, TEXT_DIM)
    assert pipe.encode_prompt("a", max_sequence_length=3)[0].shape == (1, 3, TEXT_DIM)


BATCHES = [
    (1, 1, 2, "`latents` has batch size 2; it must be 1 for 1 prompt and 1 video of each"),
    (3, 1, 2, "`latents` has batch size 2; it must be 1 or 3 for 3 prompts and 1 video of each"),
    (1, 2, 3, "`latents` has batch size 3; it must be 1 or 2 for 1 prompt and 2 videos of each"),
    (2, 3, 5, "`latents` has batch size 5; it must be 1, 2 or 6 for 2 prompts and 3 videos of each"),
]


@pytest.mark.parametrize(("prompts", "videos", "size", "message"), BATCHES)
def test_sizes_of_batches_are_told_in_good_english(pipe, prompts, videos, size, message):
    overrides = {"prompt": ["a"] * prompts, "num_videos_per_prompt": videos, "latents": latents(size, 8, 2, 4, 4)}
    with pytest.raises(ValueError, match=message):
        pipe(**tiny_arguments(**overrides))


def test_prompts_padded_to_a_billion_tokens_are_refused_where_the_tokenizer_has_no_limit(pipe, forwards, monkeypatch):
    monkeypatch.setattr(pipe.tokenizer, "model_max_length", 10**30)  # transformers' way to say so
    with pytest.raises(ValueError, match=r"prompts of 1000000000 tokens, needs .* GiB"):
        pipe(**tiny_arguments(max_sequence_length=10**9))
    assert forwards == []


@pytest.mark.parametrize("output_type", ["np", "uint8", "pt", "pil", "latent"])
@pytest.mark.parametrize("num_frames", [10**10, 2**53])
def test_a_video_that_does_not_fit_into_memory_can_only_be_streamed(pipe, forwards, output_type, num_frames):
    arguments = tiny_arguments(num_frames=num_frames, output_type=output_type)
    with pytest.raises(ValueError, match=rf"1 videos of {num_frames - 9 + 10 - 10 + 9 + 0}\d* frames|GiB"):
        pipe(**arguments)
    assert forwards == []
    with pipe.stream(**arguments) as session:
        assert next(session).index == 0


def test_a_video_of_bytes_takes_a_quarter_of_one_of_floats(pipe):
    needed = []
    for output_type in ("np", "uint8"):
        with pytest.raises(ValueError, match=f"'{output_type}'") as caught:
            pipe(**tiny_arguments(num_frames=2**40 + 1 + 4, output_type=output_type))
        needed.append(int(re.search(r"take (\d+) GiB", str(caught.value))[1]))
    assert needed[0] == pytest.approx(4 * needed[1], rel=1e-6)
    assert needed[1] == pytest.approx(2 * 64 * 64 * 3 * 2**10, rel=1e-6)


def test_a_step_count_is_refused_that_the_scheduler_cannot_solve(forwards):
    pipe = tiny_pipeline(scheduler=LongLiveScheduler(flow_shift=1e4))
    assert_raises(lambda: pipe(**tiny_arguments(num_inference_steps=200)), "200", "10000.0")
    assert forwards == []


def test_prompts_need_a_text_encoder():
    pipe = tiny_pipeline(tokenizer=None, text_encoder=None)
    assert_raises(lambda: pipe(**tiny_arguments()), "text encoder", "`prompt_embeds`")


def test_frames_need_a_vae(forwards):
    pipe = tiny_pipeline(vae=None)
    assert_raises(lambda: pipe(**tiny_arguments(output_type="np")), "AutoencoderKLWan", "NoneType")
    assert forwards == []


def test_a_vae_of_other_latents_is_noticed(forwards):
    pipe = tiny_pipeline(vae=tiny_vae(z_dim=12))
    assert_raises(lambda: pipe(**tiny_arguments()), "8", "12")
    assert forwards == []


# -- sessions --------------------------------------------------------------------------------------------------------

BAD_PROMPTS = {
    "a number": (7, ["7"]),
    "nothing": (None, ["None"]),
    "bytes": (b"a cat", ["b'a cat'"]),
    "a number among prompts": (["a", 7], ["7"]),
    "too few": (["a"], ["1", "2"]),
    "too many": (["a", "b", "c"], ["3", "2"]),
    "none": ([], ["0", "2"]),
}


@pytest.mark.parametrize(("prompt", "numbers"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
@pytest.mark.parametrize("cut", [False, True])
def test_a_session_refuses_a_prompt_and_goes_on_with_the_one_before(pipe, prompt, numbers, cut):
    def change(session):
        if cut:
            session.cut(prompt)
        else:
            session.prompt = prompt

    arguments = tiny_arguments(prompt=["a cat", "a dog"], num_frames=None)
    with pipe.stream(**arguments) as session:
        next(session)
        assert_raises(lambda: change(session), *numbers)
        assert next(session).prompt == ["a cat", "a dog"]


@pytest.mark.parametrize("cut", [False, True])
def test_a_closed_session_takes_no_prompt(pipe, cut):
    session = pipe.stream(**tiny_arguments())
    session.close()
    assert_raises(lambda: session.cut("a") if cut else setattr(session, "prompt", "a"), "closed")


def test_a_closed_session_is_at_its_end_and_may_be_closed_again(pipe):
    session = pipe.stream(**tiny_arguments())
    next(session)
    session.close()
    session.close()
    assert list(session) == []


PIXELS = torch.zeros(1, 3, 5, 32, 32)
BAD_PARTS = {
    "too many negative prompts": (lambda pipe: pipe.encode_prompt(["a", "b"], ["x", "y", "z"]), ["3", "2"]),
    "a number as prompt": (lambda pipe: pipe.encode_prompt(7), ["7"]),
    "a number among prompts": (lambda pipe: pipe.encode_prompt(["a", 7]), ["7"]),
    "a number among negative prompts": (lambda pipe: pipe.encode_prompt("a", [7]), ["7"]),
    "no prompts": (lambda pipe: pipe.encode_prompt([]), ["[]"]),
    "no prompt": (lambda pipe: pipe.encode_prompt(None), ["None"]),
    "no videos of a prompt": (lambda pipe: pipe.encode_prompt("a", num_videos_per_prompt=0), ["0"]),
    "half a token": (lambda pipe: pipe.encode_prompt("a", max_sequence_length=1.5), ["1.5"]),
    "flat embeddings": (lambda pipe: pipe.encode_prompt(None, prompt_embeds=torch.zeros(8, 16)), ["(8, 16)"]),
    "an unknown layout": (lambda pipe: pipe.decode_latents(latents(1, 8, 2, 4, 4), "gif"), ["'gif'"]),
    "nothing to decode": (lambda pipe: pipe.decode_latents(latents(1, 8, 2, 4, 4), "latent"), ["latent"]),
    "latents of an image": (lambda pipe: pipe.decode_latents(latents(1, 8, 4, 4)), ["(1, 8, 4, 4)"]),
    "latents of other channels": (lambda pipe: pipe.decode_latents(latents(1, 7, 2, 4, 4)), ["(1, 7, 2, 4, 4)"]),
    "latents of nothing": (lambda pipe: pipe.decode_latents(latents(1, 8, 0, 4, 4)), ["(1, 8, 0, 4, 4)"]),
    "latents in integers": (lambda pipe: pipe.decode_latents(latents(1, 8, 2, 4, 4).long()), ["torch.int64"]),
    "latents that are no numbers": (lambda pipe: pipe.decode_latents(with_nan(latents(1, 8, 2, 4, 4))), ["1 value"]),
    "an array of latents": (lambda pipe: pipe.decode_latents(np.zeros((1, 8, 2, 4, 4))), ["ndarray"]),
    "pixels of an image": (lambda pipe: pipe.encode_video(PIXELS[:, :, 0]), ["(1, 3, 32, 32)"]),
    "pixels with channels last": (lambda pipe: pipe.encode_video(PIXELS.movedim(1, -1)), ["(1, 5, 32, 32, 3)"]),
    "4 frames": (lambda pipe: pipe.encode_video(PIXELS[:, :, :4]), ["1 + 4 n", "(1, 3, 4, 32, 32)"]),
    "6 frames": (lambda pipe: pipe.encode_video(torch.zeros(1, 3, 6, 32, 32)), ["(1, 3, 6, 32, 32)"]),
    "no frames": (lambda pipe: pipe.encode_video(PIXELS[:, :, :0]), ["(1, 3, 0, 32, 32)"]),
    "a width that does not divide": (lambda pipe: pipe.encode_video(PIXELS[..., :24]), ["16", "(1, 3, 5, 32, 24)"]),
    "pixels up to 255": (lambda pipe: pipe.encode_video(PIXELS + 255), ["[-1, 1]", "255.0"]),
    "pixels in bytes": (lambda pipe: pipe.encode_video(PIXELS.byte()), ["torch.uint8"]),
    "pixels that are no numbers": (lambda pipe: pipe.encode_video(with_nan(PIXELS.clone())), ["nan"]),
    "an array of pixels": (lambda pipe: pipe.encode_video(PIXELS.numpy()), ["ndarray"]),
}


@pytest.mark.parametrize(("call", "numbers"), BAD_PARTS.values(), ids=BAD_PARTS)
def test_parts_of_the_pipeline_refuse_too(pipe, forwards, call, numbers):
    assert_raises(lambda: call(pipe), *numbers)


def test_parts_need_their_networks():
    pipe = tiny_pipeline(vae=None)
    assert_raises(lambda: pipe.encode_video(PIXELS), "AutoencoderKLWan", "NoneType")
    assert_raises(lambda: pipe.decode_latents(latents(1, 8, 2, 4, 4)), "AutoencoderKLWan", "NoneType")


WITHOUT_TRANSFORMER = {
    "decoding": lambda pipe: pipe.decode_latents(latents(1, 8, 2, 4, 4)),
    "a card": lambda pipe: pipe.model_card("someone/model"),
    "a LoRA": lambda pipe: pipe.load_lora_weights({}),
    "optimizing": lambda pipe: pipe.optimize("exact"),
    "a video": lambda pipe: pipe(**tiny_arguments()),
}


@pytest.mark.parametrize("call", WITHOUT_TRANSFORMER.values(), ids=WITHOUT_TRANSFORMER)
def test_what_needs_a_transformer_says_so(call):
    assert_raises(lambda: call(tiny_pipeline(transformer=None)), "This pipeline has no transformer")


def test_another_vae_leaves_latents():
    """One that has neither the scales nor the latents of Wan's, from the start or put there later."""
    expected = tiny_pipeline()(**tiny_arguments()).frames
    for pipe in (tiny_pipeline(vae=AutoencoderTiny()), tiny_pipeline()):
        pipe.vae = AutoencoderTiny()
        assert torch.equal(pipe(**tiny_arguments()).frames, expected)
        assert_raises(lambda pipe=pipe: pipe(**tiny_arguments(output_type="np")), "AutoencoderTiny", "latent")


def test_a_vae_that_is_compiled_as_a_whole_leaves_latents():
    """It is never called as a whole: that it was compiled would change nothing."""
    pipe = tiny_pipeline()
    expected = pipe(**tiny_arguments(height=32, width=64)).frames
    for pipe in (tiny_pipeline(vae=torch.compile(tiny_vae())), tiny_pipeline()):
        pipe.vae = torch.compile(tiny_vae())
        assert torch.equal(pipe(**tiny_arguments(height=32, width=64)).frames, expected)
        for call in (
            lambda pipe=pipe: pipe(**tiny_arguments(output_type="np")),
            lambda pipe=pipe: pipe.stream(**tiny_arguments(image=IMAGE)),
            lambda pipe=pipe: pipe.encode_video(PIXELS),
            lambda pipe=pipe: pipe.decode_latents(latents(1, 8, 2, 4, 4)),
        ):
            assert_raises(call, "The VAE is what `torch.compile` returned", "call `pipe.vae.decoder.compile()`")


@pytest.mark.parametrize("change", ["prompt", "cut", "blend"])
def test_a_session_that_cannot_encode_goes_on_as_it_was(change):
    pipe = tiny_pipeline(tokenizer=None, text_encoder=None)
    embeds = torch.randn(1, TEXT_LENGTH, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    with pipe.stream(**tiny_arguments(prompt=None, prompt_embeds=embeds)) as session:
        expected = [chunk.latents for chunk in session]
    with pipe.stream(**tiny_arguments(prompt=None, prompt_embeds=embeds)) as session:
        found = [next(session).latents]
        change_prompt = partial(setattr, session, "prompt") if change == "prompt" else getattr(session, change)
        assert_raises(lambda: change_prompt("a dog"), "text encoder", "`prompt_embeds`")
        found += [chunk.latents for chunk in session]
    assert torch.equal(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize("given", [1, 3])
@pytest.mark.parametrize("negative", [None, 1, 3, 6])
def test_embeddings_that_are_given_are_those_of_prompts(pipe, given, negative):
    """Both come out for all videos; as many negative ones as there are prompts, or one, or one for each video."""
    embeds, negative_embeds = (
        None if count is None else torch.randn(count, TEXT_LENGTH, TEXT_DIM) for count in (given, negative)
    )
    options = {"num_videos_per_prompt": 2, "max_sequence_length": TEXT_LENGTH}
    encode = partial(pipe.encode_prompt, None, prompt_embeds=embeds, negative_prompt_embeds=negative_embeds, **options)
    if negative is not None and negative not in (1, given, 2 * given):
        assert_raises(encode, "`negative_prompt_embeds` has batch size", str(negative))
        return
    found, found_negative = encode()
    assert torch.equal(found, embeds.repeat_interleave(2, dim=0))
    assert found_negative.shape == found.shape


def test_a_number_is_not_found_within_another():
    """Of the helper above."""
    with pytest.raises(AssertionError, match="2 is not in: got 12"):
        assert_raises(lambda: int_of("got 12"), "2")


def int_of(message: str):
    raise ValueError(message)
