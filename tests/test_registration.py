"""`import longlive_diffusers` costs nothing by itself, and diffusers finds our classes whichever is imported first."""

import os
import subprocess
import sys

import pytest

import longlive_diffusers
from longlive_diffusers.registration import register
from tests.support.paths import ROOT


CHECK = """
import sys
for word in sys.argv[1:]:
    __import__(word)
    if word == "longlive_diffusers":
        assert not {"torch", "diffusers", "numpy"} & sys.modules.keys()
from diffusers import AutoModel, DiffusionPipeline
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from longlive_diffusers.assets import toy_pipeline_path
pipe = DiffusionPipeline.from_pretrained(toy_pipeline_path())
model = AutoModel.from_pretrained(str(toy_pipeline_path()), subfolder="transformer")
print(type(pipe).__name__, type(pipe.scheduler).__name__, type(model).__name__)
print(AUTO_QUANTIZATION_CONFIG_MAPPING["longlive_nvfp4"].__name__)
"""


@pytest.mark.parametrize(
    "imported",
    [["longlive_diffusers"], ["longlive_diffusers.models.transformer_longlive"]],
    ids=["the package first", "a module of it first"],
)
def test_diffusers_finds_our_classes(imported):
    command = [sys.executable, "-c", CHECK, *imported]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["LongLivePipeline", "LongLiveScheduler", "LongLiveTransformer3DModel", "NVFP4Config"]


def test_everything_public_is_there():
    for name in longlive_diffusers.__all__:
        assert getattr(longlive_diffusers, name).__class__ is not None
    assert set(longlive_diffusers.__all__) <= set(dir(longlive_diffusers))
    with pytest.raises(AttributeError, match="module 'longlive_diffusers' has no attribute 'LongLife'"):
        _ = longlive_diffusers.LongLife


def test_diffusers_still_says_what_it_does_not_have():
    import diffusers

    with pytest.raises(AttributeError, match="diffusers has no attribute LongLife"):
        _ = diffusers.LongLife


def test_registering_twice_changes_nothing():
    before = list(sys.meta_path)
    register()
    assert sys.meta_path == before
