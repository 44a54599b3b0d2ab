"""Load the models that training starts from, and save its result: a pipeline in diffusers' format, or a LoRA, with a
model card."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard
from peft import get_peft_model_state_dict

from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.atomic_write import new_folder
from longlive_diffusers.nvfp4 import nvfp4_layers
from longlive_diffusers.pipelines.sharing import render_lora_card
from run.agreement import on_main_process
from run.arguments import Arguments, EncodingArguments, ModelArguments, OptimizationArguments, RunArguments
from run.averaging import averaged_weights
from run.cached_prompts import CachedPromptsPipeline, split_shots
from run.checkpoints import Checkpoints
from run.history import SettingsHistory
from run.lora_settings import lora_settings


# What a pipeline remembers of how its videos are made, and a run may train with other values of.
GENERATION = ("window_size", "sink_size", "multi_shot_sink", "multi_shot_rope_offset")


def generation_settings(options: Any) -> dict[str, Any]:
    """Return the settings of generation that a run was given, of which the pipeline has values of its own: what is
    trained with them is validated, saved and described with them."""
    return {name: value for name, value in vars(options).items() if name in GENERATION and value is not None}


def load_start(
    arguments: ModelArguments, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[CachedPromptsPipeline, LongLiveTransformer3DModel]:
    """
    Load the pipeline that training starts from, without its transformer and its text encoder, and the transformer.
    Wan pipelines are loaded as LongLive pipelines.

    Args:
        arguments: What to start from.
        dtype: The dtype of the transformer's weights; those that are trained need float32.
        settings: From [`generation_settings`]; the pipeline has them.

    Raises:
        ValueError: If the folder has no transformer that this package can train.
    """
    source = arguments.pretrained_model_name_or_path
    options = {"revision": arguments.revision, "variant": arguments.variant}
    transformer = load_transformer(source, dtype, arguments.chunk_size, **options)
    if nvfp4_layers(transformer) and arguments.rank is None:
        transformer.dequantize()  # all weights are trained; under a LoRA they stay in 4 bits
    pipe = CachedPromptsPipeline.from_pretrained(
        source, transformer=None, text_encoder=None, dtype=torch.float32, **options, **settings
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False).eval()
    return pipe, transformer


def load_transformer(
    source: str, dtype: torch.dtype, chunk_size: int | None = None, **options: str | None
) -> LongLiveTransformer3DModel:
    """
    Load the transformer of a pipeline.

    Args:
        source: The folder or Hub repository of the pipeline.
        dtype: The dtype of its weights.
        chunk_size: The number of latent frames of a chunk, if it is not the model's own.
        options: `revision` and `variant`, as in `from_pretrained`.

    Raises:
        ValueError: If there is none that this package can train.
    """
    overrides = {} if chunk_size is None else {"chunk_size": chunk_size}
    try:
        return LongLiveTransformer3DModel.from_pretrained(
            source, subfolder="transformer", dtype=dtype, **options, **overrides
        )
    except OSError as error:
        raise ValueError(f"'{source}' has no transformer to start from: {error}") from error


def trained_weights(accelerator: Accelerator, model: torch.nn.Module, ema: EMAModel | None) -> dict[str, torch.Tensor]:
    """Return the complete state dict of the network, of averaged weights if an average was kept. Every process has to
    call this function."""
    with averaged_weights(model, ema):
        return {name: tensor.detach().cpu().clone() for name, tensor in accelerator.get_state_dict(model).items()}


def save_or_checkpoint(
    accelerator: Accelerator, save: Callable[[], list[str]], checkpoints: Checkpoints, *, step: int, saved_step: int
) -> list[str]:
    """
    Let the main process save the result of a run, and keep its last updates in a checkpoint if that fails. Every
    process has to call this.

    Args:
        accelerator: The accelerator of the run.
        save: Saves the result, and returns the names of its files and folders.
        checkpoints: The checkpoints of the run.
        step: The number of updates that were made.
        saved_step: That of the newest checkpoint.

    Returns:
        What `save` returned.

    Raises:
        ValueError, OSError: What it raised in the main process; in the others, a ValueError.
    """
    try:
        return on_main_process(accelerator, save)
    except (ValueError, OSError):
        if saved_step < step:
            checkpoints.save(step)
        raise


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

    def write(folder: Path) -> None:
        card = _save_weights(weights, transformer, arguments, repo_id, folder)
        card.text += training_section(arguments, history, repo_id)
        card.save(folder / "README.md")

    return place_result(arguments.run.output, write)


def place_result(output: Path, write: Callable[[Path], None], *, sometimes: tuple[str, ...] = ()) -> list[str]:
    """
    Let `write` write a result into a new folder, then move all of it into the folder of the run.

    Args:
        output: The folder of the run.
        write: Writes the result into a folder.
        sometimes: Files that not every result has: those of an earlier one do not stay beside a new one.

    Returns:
        The names of the files and folders that were written.
    """
    with new_folder(output / "result", replace=True) as result:
        write(result)
    # The index is taken away first and moved last: without it, the folder is not taken for a pipeline.
    (output / "model_index.json").unlink(missing_ok=True)
    names = [path.name for path in (output / "result").iterdir()]
    names.sort(key=lambda name: (name == "model_index.json", name))
    for name in names:
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        os.replace(output / "result" / name, output / name)
    for name in set(sometimes) - set(names):
        (output / name).unlink(missing_ok=True)
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
    details = card_details(arguments.run, arguments.data, arguments.model.pretrained_model_name_or_path)
    settings = generation_settings(arguments.objective)
    if arguments.model.rank is not None:
        LongLivePipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, state_dict=weights),
            transformer_lora_adapter_metadata=lora_settings(transformer.peft_config["default"]),
        )
        return render_lora_card(repo_id, rank=arguments.model.rank, settings=settings, **details)
    plain = {_plain(name): tensor for name, tensor in weights.items()}
    return save_pipeline(plain, transformer.config, arguments.model, settings, folder).model_card(repo_id, **details)


def save_pipeline(
    weights: dict[str, torch.Tensor],
    config: Mapping[str, Any],
    model: ModelArguments,
    settings: Mapping[str, Any],
    folder: Path,
) -> LongLivePipeline:
    """Write the pipeline that training started from, with a transformer of this configuration and these weights, and
    with the settings that it was trained with, and return it."""
    with torch.device("meta"):
        trained = LongLiveTransformer3DModel.from_config(dict(config))
    trained.load_state_dict(weights, assign=True)
    pipe = LongLivePipeline.from_pretrained(
        model.pretrained_model_name_or_path,
        transformer=trained,
        dtype=torch.float32,
        revision=model.revision,
        variant=model.variant,
        **settings,
    )
    pipe.save_pretrained(folder)
    return pipe


def card_details(run: RunArguments, data: EncodingArguments, base_model: str) -> dict[str, Any]:
    """
    Return what a card says about using the result: the settings that validation used.

    Args:
        run, data: The settings of the run.
        base_model: The pipeline that the result was made from, or is loaded into.
    """
    details: dict[str, Any] = {
        "num_inference_steps": run.validation_num_inference_steps,
        "guidance_scale": run.validation_guidance_scale,
        "fps": int(data.fps) if data.fps == int(data.fps) else data.fps,
        "base_model": None if Path(base_model).exists() else base_model,  # a local folder means nothing to others
    }
    if run.validation_prompts:
        details["prompt"] = split_shots(run.validation_prompts[0])[0]
    return details


def training_section(arguments: Arguments, history: SettingsHistory, repo_id: str) -> str:
    """Return the section of a card that says how the result was trained."""
    intro = "Teacher forcing, with `training/train_ar.py` of longlive-diffusers."
    text = training_table(intro, training_facts(arguments, history))
    if arguments.optimization.precision == "nvfp4" and arguments.model.rank is None:
        recipe = arguments.optimization.nvfp4_recipe
        text += (
            "\nThese weights are in float32. Rounded to 4 bits as in training: "
            f"`longlive quantize {repo_id} --output FOLDER --recipe {recipe}`\n"
        )
    return text


def training_table(intro: str, facts: Mapping[str, str | int]) -> str:
    """Return a section of a card: how the result was trained, in a sentence, and the settings as a table."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"\n\n## Training\n\n{intro}\n\n| | |\n|---|---|\n{rows}\n"


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
    "distance in time positions at a cut": "multi_shot_rope_offset",
    "seed": "seed",
}


def training_facts(arguments: Arguments, history: SettingsHistory) -> dict[str, str | int]:
    """Return the rows of a card: what the run was trained with."""
    optimization = arguments.optimization
    clips = optimization.train_batch_size * optimization.gradient_accumulation_steps
    facts: dict[str, str | int] = {
        "updates": optimization.max_train_steps,
        "clips of an update, each data-parallel group": clips,
        "precision": precision_in_words(arguments.model, arguments.optimization, history),
    }
    rows = FACTS if arguments.model.rank is None else LORA_FACTS | FACTS
    return facts | {row: history.describe(name) for row, name in rows.items()}


def precision_in_words(model: ModelArguments, optimization: OptimizationArguments, history: SettingsHistory) -> str:
    """Return what was computed in, in which precision."""
    words = history.describe("mixed_precision")
    if optimization.precision != "nvfp4":
        return words
    if model.rank is not None:
        return f"{words}, with the frozen weights in NVFP4"
    return f"NVFP4, recipe {optimization.nvfp4_recipe}; everything else in {words}"


def _plain(name: str) -> str:
    """Return the name of a parameter without what compiling or wrapping its module added."""
    return name.removeprefix("module.").replace("_orig_mod.", "")
