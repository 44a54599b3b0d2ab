"""The embedded pipeline with only the first blocks of its network: for tests of many videos of which none is looked
at."""

from copy import deepcopy

import torch
from diffusers import DiffusionPipeline

from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.assets import toy_pipeline_path


def cut_blocks(transformer: LongLiveTransformer3DModel, num_blocks: int) -> None:
    """Leave a network only its first blocks."""
    transformer.blocks = transformer.blocks[:num_blocks]
    transformer.register_to_config(num_layers=num_blocks)


def short_toy_pipeline(num_blocks: int) -> LongLivePipeline:
    """The embedded pipeline in float32, without its VAE, cut to so many blocks."""
    pipe = DiffusionPipeline.from_pretrained(toy_pipeline_path(), vae=None, dtype=torch.float32)
    cut_blocks(pipe.transformer, num_blocks)
    return pipe


def copy_of(pipe: LongLivePipeline) -> LongLivePipeline:
    """A pipeline with a network of its own, which has the LoRAs that `pipe` has loaded."""
    copied = LongLivePipeline(**{**pipe.components, "transformer": deepcopy(pipe.transformer)})
    copied.set_progress_bar_config(disable=True)
    return copied
