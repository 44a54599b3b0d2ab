"""`import longlive_diffusers` costs nothing by itself, and diffusers finds our classes whichever is imported first."""

import os
import subprocess
import sys

import pytest

import longlive_diffusers
from longlive_diffusers.registration import register
from tests.support.paths import ROOT


NOTHING = """
import sys
import longlive_diffusers
assert not {"torch", "diffusers", "numpy"} & sys.modules.keys()
"""
CHECK = """
import longlive_diffusers.models.transformer_longlive
from diffusers import AutoModel, DiffusionPipeline
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from longlive_diffusers.assets import toy_pipeline_path
pipe = DiffusionPipeline.from_pretrained(toy_pipeline_path())
model = AutoModel.from_pretrained(str(toy_pipeline_path()), subfolder="transformer")
print(type(pipe).__name__, type(pipe.scheduler).__name__, type(model).__name__)
print(AUTO_QUANTIZATION_CONFIG_MAPPING["longlive_nvfp4"].__name__)
"""


def run_python(code: str) -> list[str]:
    """The words that a new process prints."""
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_importing_the_package_imports_nothing_else():
    assert run_python(NOTHING) == []


def test_diffusers_finds_our_classes_where_a_module_of_the_package_is_imported_first():
    """Where the package is, as users do: see the programs of `test_readme.py`."""
    expected = ["LongLivePipeline", "LongLiveScheduler", "LongLiveTransformer3DModel", "NVFP4Config"]
    assert run_python(CHECK) == expected


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
