"""Prepare the network of a run for training: 4-bit layers, a LoRA, gradient checkpointing, attention, compilation."""

import logging
import warnings
from collections.abc import Sequence

from accelerate import Accelerator
from peft import LoraConfig

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.models.activation_offloading import checkpoint_on_host
from longlive_diffusers.nvfp4 import NVFP4Config, nvfp4_layers, quantize_model
from longlive_diffusers.nvfp4.recipes import recipe_named
from longlive_diffusers.nvfp4.training import train_in_nvfp4
from run.arguments import ModelArguments, OptimizationArguments


logger = logging.getLogger("network")


def prepare_transformer(
    transformer: LongLiveTransformer3DModel, model: ModelArguments, optimization: OptimizationArguments
) -> None:
    """Prepare a loaded transformer for training, in place.

    Raises:
        ValueError: If the network or this machine does not support a setting.
    """
    transformer.train()
    if optimization.precision == "nvfp4":
        use_nvfp4(transformer, optimization, trains_lora=model.rank is not None)
    if model.rank is not None:
        add_lora(transformer, model)
    set_computation(transformer, optimization)
    if optimization.compile:
        transformer.compile_repeated_blocks()


def check_attention_backend(accelerator: Accelerator, optimization: OptimizationArguments) -> None:
    """Raise a ValueError for FlexAttention on a CPU, where it has no gradients."""
    if optimization.attention_backend == "flex" and accelerator.device.type == "cpu":
        raise ValueError("--attention_backend flex has no gradients on a CPU: use native there")


def set_computation(transformer: LongLiveTransformer3DModel, optimization: OptimizationArguments) -> None:
    """Choose gradient checkpointing and the attention backend as the options say."""
    if optimization.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(checkpoint_on_host if optimization.activation_offloading else None)
    if optimization.attention_backend is not None:
        transformer.set_attention_backend(optimization.attention_backend)


def use_nvfp4(
    transformer: LongLiveTransformer3DModel, optimization: OptimizationArguments, *, trains_lora: bool
) -> None:
    """Switch the linear layers of the blocks to 4 bits: in training, all three matrix products of each layer; under a
    LoRA, the frozen weights."""
    if trains_lora:
        if not nvfp4_layers(transformer):
            quantize_model(transformer, NVFP4Config())
        return
    recipe = recipe_named(optimization.nvfp4_recipe)
    layers = train_in_nvfp4(transformer, recipe, optimization.nvfp4_backend)
    logger.info("%d linear layers train in NVFP4, recipe '%s'", len(layers), recipe.name)


def add_lora(
    transformer: LongLiveTransformer3DModel, model: ModelArguments, names: Sequence[str] = ("default",)
) -> None:
    """Freeze the network, and add LoRAs that are trained instead, with these names (of adapters in PEFT)."""
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=model.rank,
        lora_alpha=model.lora_alpha or model.rank,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_layers,
        init_lora_weights="gaussian",
    )
    try:
        with warnings.catch_warnings():
            # PEFT asks whether a second adapter is meant.
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
            for name in names:
                transformer.add_adapter(config, name)
    except ValueError as error:
        raise ValueError(f"--lora_layers {model.lora_layers!r}: {error}") from error
