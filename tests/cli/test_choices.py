"""The names that options spell out, so that parsing imports nothing heavy, are the names that there are."""

import torch

from longlive_diffusers import dtypes
from longlive_diffusers.benchmark.sizes import SIZES
from longlive_diffusers.cli import choices
from longlive_diffusers.models import layer_kv_cache
from longlive_diffusers.nvfp4.backends import BACKENDS
from longlive_diffusers.nvfp4.format import BLOCKS
from longlive_diffusers.nvfp4.quantizer import DEFAULT_MODULES_TO_NOT_CONVERT
from longlive_diffusers.nvfp4.recipes import RECIPES
from longlive_diffusers.nvfp4.rules import RULES
from longlive_diffusers.pipelines import speed
from longlive_diffusers.pipelines.chunk_step import CLEAN_PASSES


def test_they_are_the_names_that_there_are():
    assert tuple(dtypes.DTYPES) == choices.DTYPES
    assert choices.KV_CACHE_DTYPES == layer_kv_cache.KV_CACHE_DTYPES
    assert tuple(BACKENDS) == choices.NVFP4_BACKENDS
    assert CLEAN_PASSES == choices.CLEAN_PASSES
    assert tuple(RULES) == choices.SCALE_RULES
    assert tuple(RECIPES) == choices.RECIPES
    assert tuple(choices.WEIGHT_BLOCKS.values()) == BLOCKS
    assert all(name == "x".join(map(str, block)) for name, block in choices.WEIGHT_BLOCKS.items())
    assert choices.KEPT_MODULES == DEFAULT_MODULES_TO_NOT_CONVERT
    assert tuple(SIZES) == choices.BENCH_SIZES
    assert choices.SPEEDS == speed.SPEEDS


def test_the_largest_seed_is_the_largest_that_torch_takes():
    torch.Generator().manual_seed(choices.MAX_SEED)
