"""Load the models that training starts from, and save its result: a pipeline in diffusers' format, or a LoRA, with a
model card."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel, _collate_lora_metadata
from huggingface_hub import ModelCard
from peft import get_peft_model_state_dict

from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.atomic_write import new_folder
from longlive_diffusers.nvfp4 import nvfp4_layers
from longlive_diffusers.pipelines.sharing import render_lora_card
from run.arguments import Arguments, ModelArguments
from run.averaging import averaged_weights
from run.cached_prompts import CachedPromptsPipeline, split_shots
from run.history import SettingsHistory


def load_start(arguments: ModelArguments) -> tuple[CachedPromptsPipeline, LongLiveTransformer3DModel]:
    """
    Load the pipeline that training starts from, without its transformer and its text encoder, and the transformer in
    float32, the precision of the weights that are trained. Wan pipelines are loaded as LongLive pipelines.

    Raises:
        ValueError: If the folder has no transformer that this package can train.
    """
    options = {"revision": arguments.revision, "variant": arguments.variant}
    source = arguments.pretrained_model_name_or_path
    overrides = {} if arguments.chunk_size is None else {"chunk_size": arguments.chunk_size}
    try:
        transformer = LongLiveTransformer3DModel.from_pretrained(
            source, subfolder="transformer", dtype=torch.float32, **options, **overrides
        )
    except OSError as error:
        raise ValueError(f"'{source}' has no transformer to start from: {error}") from error
    if nvfp4_layers(transformer) and arguments.rank is None:
        transformer.dequantize()  # all weights are trained; under a LoRA they stay in 4 bits
    pipe = CachedPromptsPipeline.from_pretrained(
        source, transformer=None, text_encoder=None, dtype=torch.float32, **options
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False).eval()
    return pipe, transformer


def trained_weights(accelerator: Accelerator, model: torch.nn.Module, ema: EMAModel | None) -> dict[str, torch.Tensor]:
    """Return the complete state dict of the network, of averaged weights if an average was kept. Every process has to
    call this function."""
    with averaged_weights(model, ema):
        return {name: tensor.detach().cpu().clone() for name, tensor in accelerator.get_state_dict(model).items()}


def save_result(
    weights: dict[str, torch.Tensor],
    transformer: LongLiveTransformer3DModel,
    arguments: Arguments,
    history: SettingsHistory,
    repo_id: str,
) -> list[str]:
    """
    Write the trained pipeline or LoRA into the run's folder. All of it is first written to a subfolder, then moved.

    Args:
        weights: The complete state dict.
        transformer: The network that was trained, for its configuration.
        arguments: The settings of the run.
        history: The settings that were used, also before the run was resumed.
        repo_id: The name of the result on the Hub.

    Returns:
        The names of the files and folders that were written.
    """
    output = arguments.run.output
    with new_folder(output / "result", replace=True) as result:
        card = _save_weights(weights, transformer, arguments, repo_id, result)
        card.text += training_section(arguments, history, repo_id)
        card.save(result / "README.md")
    # The index is moved last: without it, the folder is not taken for a pipeline.
    names = sorted((path.name for path in (output / "result").iterdir()), key=lambda name: name == "model_index.json")
    for name in names:
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        os.replace(output / "result" / name, output / name)
    (output / "result").rmdir()
    return names


def _save_weights(
    weights: dict[str, torch.Tensor],
    transformer: LongLiveTransformer3DModel,
    arguments: Arguments,
    repo_id: str,
    folder: Path,
) -> ModelCard:
    """Write the LoRA or the complete pipeline, and return its model card, which is not saved yet."""
    details = card_details(arguments)
    if arguments.model.rank is not None:
        LongLivePipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, state_dict=weights),
            **_collate_lora_metadata({"transformer": transformer}),
        )
        return render_lora_card(repo_id, rank=arguments.model.rank, **details)
    source = arguments.model.pretrained_model_name_or_path
    with torch.device("meta"):
        trained = LongLiveTransformer3DModel.from_config(dict(transformer.config))
    trained.load_state_dict({_plain(name): tensor for name, tensor in weights.items()}, assign=True)
    options = {"revision": arguments.model.revision, "variant": arguments.model.variant}
    pipe = LongLivePipeline.from_pretrained(source, transformer=trained, dtype=torch.float32, **options)
    pipe.save_pretrained(folder)
    return pipe.model_card(repo_id, **details)


def card_details(arguments: Arguments) -> dict[str, Any]:
    """Return what a card says about using the result: the settings that validation used."""
    run, data, source = arguments.run, arguments.data, arguments.model.pretrained_model_name_or_path
    details: dict[str, Any] = {
        "num_inference_steps": run.validation_num_inference_steps,
        "guidance_scale": run.validation_guidance_scale,
        "fps": int(data.fps) if data.fps == int(data.fps) else data.fps,
        "base_model": None if Path(source).exists() else source,  # a local folder means nothing to others
    }
    if run.validation_prompts:
        details["prompt"] = split_shots(run.validation_prompts[0])[0]
    return details


def training_section(arguments: Arguments, history: SettingsHistory, repo_id: str) -> str:
    """Return the section of a card that says how the result was trained."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in training_facts(arguments, history).items())
    intro = "Teacher forcing, with `training/train_ar.py` of longlive-diffusers."
    text = f"\n## Training\n\n{intro}\n\n| | |\n|---|---|\n{rows}\n"
    if arguments.optimization.precision == "nvfp4" and arguments.model.rank is None:
        recipe = arguments.optimization.nvfp4_recipe
        text += (
            "\nThese weights are in float32. Rounded to 4 bits as in training: "
            f"`longlive quantize {repo_id} --output FOLDER --recipe {recipe}`\n"
        )
    return text


# Rows of a card, and the settings that they state.
LORA_FACTS = {"LoRA rank": "rank", "LoRA dropout": "lora_dropout"}
FACTS = {
    "latent frames of a clip": "num_latent_frames",
    "frames per second": "fps",
    "optimizer": "optimizer",
    "learning rate": "learning_rate",
    "schedule": "lr_scheduler",
    "warm-up steps": "lr_warmup_steps",
    "AdamW beta 1": "adam_beta1",
    "AdamW beta 2": "adam_beta2",
    "AdamW epsilon": "adam_epsilon",
    "weight decay": "adam_weight_decay",
    "gradients clipped to a norm of": "max_grad_norm",
    "weights averaged with decay": "ema_decay",
    "error recycling": "error_recycling",
    "weighting of timesteps": "weighting_scheme",
    "image conditioning, share of clips": "image_probability",
    "prompt dropout": "prompt_dropout",
    "seed": "seed",
}


def training_facts(arguments: Arguments, history: SettingsHistory) -> dict[str, str | int]:
    """Return the rows of a card: what the run was trained with."""
    optimization = arguments.optimization
    clips = optimization.train_batch_size * optimization.gradient_accumulation_steps
    facts: dict[str, str | int] = {
        "updates": optimization.max_train_steps,
        "clips of an update, each data-parallel group": clips,
        "precision": precision_in_words(arguments, history),
    }
    rows = FACTS if arguments.model.rank is None else LORA_FACTS | FACTS
    return facts | {row: history.describe(name) for row, name in rows.items()}


def precision_in_words(arguments: Arguments, history: SettingsHistory) -> str:
    """Return what was computed in, in which precision."""
    words = history.describe("mixed_precision")
    if arguments.optimization.precision != "nvfp4":
        return words
    if arguments.model.rank is not None:
        return f"{words}, with the frozen weights in NVFP4"
    return f"NVFP4, recipe {arguments.optimization.nvfp4_recipe}; everything else in {words}"


def _plain(name: str) -> str:
    """Return the name of a parameter without what compiling or wrapping its module added."""
    return name.removeprefix("module.").replace("_orig_mod.", "")
