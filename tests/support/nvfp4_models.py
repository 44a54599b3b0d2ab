"""A network whose layers divide into blocks of 16, and a pipeline around it."""

from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from tests.support.tiny_pipeline import tiny_pipeline, tiny_transformer


NUM_LAYERS = 20  # linear layers in its two blocks


def small_transformer(**overrides) -> LongLiveTransformer3DModel:
    return tiny_transformer(**{"attention_head_dim": 16, "ffn_dim": 64, **overrides})


def small_pipeline(**components) -> LongLivePipeline:
    return tiny_pipeline(**{"transformer": small_transformer(), **components})
