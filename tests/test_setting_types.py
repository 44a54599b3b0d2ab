"""The types of a configuration's values are those of the constructor that takes them."""

import json

import pytest
from diffusers import AutoencoderKLWan

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.setting_types import check_setting_types
from tests.support.checks import assert_raises
from tests.support.tiny_pipeline import tiny_transformer


CLASSES = {
    "model_index.json": LongLivePipeline,
    "transformer/config.json": LongLiveTransformer3DModel,
    "vae/config.json": AutoencoderKLWan,
    "scheduler/scheduler_config.json": LongLiveScheduler,
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_was_saved_fits(name):
    check_setting_types(json.loads((toy_pipeline_path() / name).read_text()), CLASSES[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": 1},
        {"patch_size": [1, 2, 2]},
        {"patch_size": (1, 2, 2)},
        {"image_dim": None},
        {"image_dim": 3},
        {"not_a_setting": object()},
    ],
)
def test_what_json_cannot_say_otherwise_is_taken(settings):
    check_setting_types(settings, LongLiveTransformer3DModel)


@pytest.mark.parametrize(
    ("component_class", "settings", "message"),
    [
        (LongLiveTransformer3DModel, {"num_layers": "30"}, "num_layers has to be a whole number, got '30'"),
        (LongLiveTransformer3DModel, {"num_layers": 30.0}, "num_layers has to be a whole number, got 30.0"),
        (LongLiveTransformer3DModel, {"num_layers": True}, "num_layers has to be a whole number, got True"),
        (LongLiveTransformer3DModel, {"num_layers": None}, "num_layers has to be a whole number, got None"),
        (LongLiveTransformer3DModel, {"patch_size": [1, 2]}, "patch_size has to be a list of 3"),
        (LongLiveTransformer3DModel, {"patch_size": 2}, "patch_size has to be a list of 3"),
        (LongLiveTransformer3DModel, {"patch_size": "122"}, "patch_size has to be a list of 3"),
        (LongLiveTransformer3DModel, {"cross_attn_norm": "no"}, "cross_attn_norm has to be true or false, got 'no'"),
        (LongLiveTransformer3DModel, {"cross_attn_norm": 1}, "cross_attn_norm has to be true or false, got 1"),
        (LongLiveTransformer3DModel, {"image_dim": "x"}, "image_dim has to be a whole number or null, got 'x'"),
        (LongLiveTransformer3DModel, {"qk_norm": None, "eps": "x"}, "qk_norm has to be a text, got None; eps has"),
        (AutoencoderKLWan, {"dim_mult": 4}, "dim_mult has to be a list of (a whole number), got 4"),
        (AutoencoderKLWan, {"latents_mean": [0.5, "x"]}, "latents_mean has to be a list of (a number)"),
        (LongLiveScheduler, {"flow_shift": "5"}, "flow_shift has to be a number, got '5'"),
        (LongLivePipeline, {"window_size": "32"}, "window_size has to be a whole number, got '32'"),
        (LongLivePipeline, {"scene_cut_prefix": None}, "scene_cut_prefix has to be a text, got None"),
    ],
)
def test_wrong_types_are_named(component_class, settings, message):
    with pytest.raises(ValueError) as error:
        check_setting_types(settings, component_class)
    assert f"{component_class.__name__}: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"num_layers": 0}, ["num_layers", 0]),
        ({"num_layers": -1, "ffn_dim": 0}, ["num_layers", -1, "ffn_dim", 0]),
        ({"sample_height": 0}, ["sample_height", 0]),
        ({"patch_size": (1, 0, 2)}, ["patch_size", 0]),
        ({"num_layers": "2"}, ["num_layers", 2]),
    ],
)
def test_a_network_that_cannot_be_is_refused(settings, numbers):
    assert_raises(lambda: tiny_transformer(**settings), *numbers)
