"""Pipelines with random weights, built where they are to run."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, ModelMixin
from torch import nn

from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..schedulers.scheduling_longlive import LongLiveScheduler
from .sizes import BenchSize


Model = TypeVar("Model", bound=ModelMixin)


def random_pipeline(size: BenchSize, device: torch.device, dtype: torch.dtype) -> LongLivePipeline:
    """Build a pipeline without a text encoder: its prompts are random embeddings."""
    pipe = LongLivePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=random_model(AutoencoderKLWan, size.vae, device, dtype),
        transformer=random_model(LongLiveTransformer3DModel, size.transformer, device, dtype),
        scheduler=LongLiveScheduler(),
        window_size=size.window_size,
        sink_size=size.sink_size,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_model(
    model_class: type[Model], config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> Model:
    """Build a model in the dtypes that `from_pretrained` gives it: in `dtype`, except for the modules that are kept in
    float32.

    Weights are created one by one on the device, because a 5B network built in float32 on the CPU would take 20 GB.
    """
    with init_empty_weights():
        model = model_class(**config)
    kept = set(model_class._keep_in_fp32_modules or ()) if dtype != torch.float32 else set()
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        weight_dtype = dtype if kept.isdisjoint(name.split(".")) else torch.float32
        weight = torch.empty(parameter.shape, dtype=weight_dtype, device=device)
        if parameter.ndim == 1:
            weights[name] = weight.fill_(1.0 if name.endswith(".weight") else 0.0)  # norms; biases
        else:
            weights[name] = weight.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    model.load_state_dict(weights, assign=True)
    nn.Module.to(model, device)  # the buffers
    return model.requires_grad_(False).eval()
