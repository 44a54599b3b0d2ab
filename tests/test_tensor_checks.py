"""Tensors that are not stored number by number are refused wherever a caller can give one, in one line."""

import warnings

import pytest
import torch

from longlive_diffusers import LongLivePipeline, VideoWriter
from longlive_diffusers.tensor_checks import check_finite, check_floats, check_plain
from tests.support.checks import assert_raises
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


def nested(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that their interface may change
        return torch.nested.nested_tensor(list(tensor))


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are to go
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


# What is made of a tensor, and what the message calls it.
NOT_PLAIN = {
    "meta": (lambda tensor: tensor.to("meta"), "meta device"),
    "sparse": (lambda tensor: tensor.to_sparse(), "sparse"),
    "hybrid": (lambda tensor: tensor.to_sparse(2), "sparse"),
    "quantized": (quantized, "torch.qint8"),
    "nested": (nested, "nested"),
}
LATENTS, PIXELS = torch.zeros(1, 8, 4, 4, 4), torch.zeros(5, 3, 64, 64)
PLACES = {
    "`latents`": lambda pipe, make: pipe(**tiny_arguments(latents=make(LATENTS))),
    "`image_latents`": lambda pipe, make: pipe(**tiny_arguments(image_latents=make(LATENTS[:, :, :1]))),
    "`video_latents`": lambda pipe, make: pipe.stream(**tiny_arguments(video_latents=make(LATENTS[:, :, :2]))),
    "`prompt_embeds`": lambda pipe, make: pipe(
        **tiny_arguments(prompt=None, prompt_embeds=make(torch.zeros(1, 8, 16)))
    ),
    "`negative_prompt_embeds`": lambda pipe, make: pipe(
        **tiny_arguments(negative_prompt_embeds=make(torch.zeros(1, 8, 16)))
    ),
    "`image`": lambda pipe, make: pipe(**tiny_arguments(image=make(PIXELS[0]))),
    "`video`": lambda pipe, make: pipe(**tiny_arguments(video=make(PIXELS))),
    "The video to encode": lambda pipe, make: pipe.encode_video(make(PIXELS.movedim(0, 1)[None])),
    "What a callback returned as `latents`": lambda pipe, make: pipe(
        **tiny_arguments(callback_on_step_end=lambda pipe, step, time, tensors: {"latents": make(tensors["latents"])})
    ),
}


@pytest.fixture(scope="module")
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


@pytest.mark.parametrize(("make", "kind"), NOT_PLAIN.values(), ids=NOT_PLAIN)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_stored_number_by_number_is_refused(pipe, place, make, kind):
    assert_raises(lambda: PLACES[place](pipe, make), place, kind)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("`image`", "`video`")])
def test_what_holds_no_floats_is_refused(pipe, place, dtype):
    assert_raises(lambda: PLACES[place](pipe, lambda tensor: tensor.to(dtype)), place, dtype)


@pytest.mark.parametrize(("make", "kind"), NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_a_writer_refuses_them_too(tmp_path, make, kind):
    frames = torch.zeros(2, 32, 32, 3)
    with VideoWriter(tmp_path / "video.mp4") as writer:
        assert_raises(lambda: writer.write(make(frames)), "frames", kind)
        writer.write(frames.to(torch.float8_e4m3fn))
    assert writer.frames_written == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_taken(dtype):
    check_floats("x", torch.zeros(2, 3, dtype=dtype).T)


def test_integers_are_plain():
    check_plain("x", torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("values", "text"), [([float("nan")], "1 value that is not"), ([float("inf"), 1, float("nan")], "2 values that")]
)
def test_what_is_not_finite_is_counted(values, text):
    assert_raises(lambda: check_finite("`x`", torch.tensor(values)), text)
