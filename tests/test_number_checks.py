"""Booleans and counts are what Python calls so; every public boolean argument is checked."""

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch

from longlive_diffusers import KVCache, LongLivePipeline, LongLiveScheduler, Shot, convert_checkpoint, pixel_frames
from longlive_diffusers.models.transformer_longlive import LongLiveTransformer3DModel
from longlive_diffusers.number_checks import check_booleans, check_counts
from tests.support.checks import assert_raises
from tests.support.tiny_pipeline import random_inputs, tiny_arguments, tiny_cache, tiny_components, tiny_pipeline


NOT_BOOLEANS = ("no", "", 0, 1, 1.0, [], np.array([True]), torch.tensor(True))


@pytest.fixture(scope="module")
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


@pytest.mark.parametrize("value", NOT_BOOLEANS, ids=repr)
def test_only_booleans_are_booleans(value):
    check_booleans(yes=True, no=False, numpy=np.bool_(True))
    assert_raises(lambda: check_booleans(yes=True, flag=value), "`flag` must be True or False", repr(value))


@pytest.mark.parametrize("value", [0, -1, 1.0, True, np.bool_(True), "1", float("nan"), None])
def test_only_integers_from_one_on_are_counts(value):
    check_counts(one=1, numpy=np.int64(3), huge=10**400)
    assert_raises(lambda: check_counts(count=value), "`count` must be an integer of at least 1", repr(value))


def step(options: dict) -> object:
    scheduler = LongLiveScheduler()
    scheduler.set_timesteps(2)
    return scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1), **options)


# Every public function that has boolean arguments, called with some of them.
CALLS: dict[Callable, Callable[[LongLivePipeline, dict], object]] = {
    LongLivePipeline.__init__: lambda pipe, options: LongLivePipeline(**tiny_components(), **options),
    LongLivePipeline.__call__: lambda pipe, options: pipe(**tiny_arguments(**options)),
    LongLivePipeline.stream: lambda pipe, options: pipe.stream(**tiny_arguments(**options)),
    LongLivePipeline.encode_prompt: lambda pipe, options: pipe.encode_prompt("a", **options),
    LongLivePipeline.load_lora_weights: lambda pipe, options: pipe.load_lora_weights("missing.pt", **options),
    LongLiveScheduler.__init__: lambda pipe, options: LongLiveScheduler(**options),
    LongLiveScheduler.step: lambda pipe, options: step(options),
    LongLiveTransformer3DModel.forward: lambda pipe, options: pipe.transformer(**random_inputs(), **options),
    LongLiveTransformer3DModel.create_kv_cache: lambda pipe, options: tiny_cache(pipe.transformer, **options),
    LongLiveTransformer3DModel.from_pretrained: lambda pipe, options: LongLiveTransformer3DModel.from_pretrained(
        "missing", **options
    ),
    KVCache.begin_chunk: lambda pipe, options: tiny_cache(pipe.transformer).begin_chunk(2, **options),
    Shot.__init__: lambda pipe, options: Shot("a", 1, **options),
    pixel_frames: lambda pipe, options: pixel_frames(3, **options),
}
BOOLEANS = [
    (function, name)
    for function in CALLS
    for name, parameter in inspect.signature(function).parameters.items()
    if "bool" in str(parameter.annotation)
]


def test_the_public_booleans_are_found():
    assert {name for _, name in BOOLEANS} == {
        "multi_shot_sink",
        "relative_rope",
        "return_dict",
        "async_decode",
        "split_first_chunk",
        "do_classifier_free_guidance",
        "hotswap",
        "lower_order_final",
        "output_loading_info",
        "opens_shot",
        "opens",
        "opens_video",
    }


@pytest.mark.parametrize("value", ["no", 1])
@pytest.mark.parametrize(("function", "name"), BOOLEANS, ids=[f"{f.__qualname__} {name}" for f, name in BOOLEANS])
def test_every_public_boolean_is_checked(pipe, function, name, value):
    assert_raises(lambda: CALLS[function](pipe, {name: value}), name, repr(value))


def test_a_conversion_checks_its_boolean_before_it_reads(tmp_path):
    with pytest.raises(ValueError, match="`use_ema` must be True or False, got 'no'"):
        convert_checkpoint("missing.pt", "missing", tmp_path / "out", use_ema="no")
