"""The arguments of the training scripts: settings dataclasses that `HfArgumentParser` turns into options, which a YAML
file may set. Each setting is defined once: as a field of its dataclass, with its default and its help."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from diffusers.optimization import SchedulerType
from transformers import HfArgumentParser

from longlive_diffusers.nvfp4.recipes import RECIPES, recipe_named
from objectives.error_recycling import RecyclingSettings
from objectives.teacher_forcing import TeacherForcingSettings


@dataclass(eq=False)
class ModelArguments:
    pretrained_model_name_or_path: str = field(
        metadata={
            "help": "The folder or Hub repository to start from: a LongLive pipeline, or a Wan one in its layout."
        }
    )
    revision: str | None = field(default=None, metadata={"help": "The branch, tag or commit of the Hub repository."})
    variant: str | None = field(
        default=None, metadata={"help": "The variant of the weight files, for example 'bf16'."}
    )
    chunk_size: int | None = field(
        default=None,
        metadata={"help": "The number of latent frames that are denoised together (default: the model's own)."},
    )
    rank: int | None = field(default=None, metadata={"help": "Train a LoRA of this rank instead of all weights."})
    lora_alpha: int | None = field(default=None, metadata={"help": "The scale of the LoRA (default: its rank)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "The dropout probability of the LoRA."})
    lora_layers: str = field(
        default=r"blocks\..*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)",
        metadata={
            "help": "The layers that get a LoRA, as a regular expression (default: every Linear of the blocks)."
        },
    )


@dataclass(eq=False)
class DataArguments:
    train_data_dir: str | None = field(
        default=None,
        metadata={"help": "The folder of the training set; not needed where the caches are complete."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "The training set on the Hub, in place of a folder; needs the package datasets."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of the Hub data set, if it has several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "The part of the Hub data set."})
    caption_column: str | None = field(
        default=None,
        metadata={"help": "The captions of a list of clips (default: the one there is of caption, text and prompt)."},
    )
    data_cache_dir: str | None = field(
        default=None,
        metadata={"help": "The folder where latents and text embeddings are kept (default: OUTPUT_DIR/cache)."},
    )
    cache_latents: bool = field(
        default=True,
        metadata={"help": "Encode all videos before training; otherwise, each batch is encoded when it is needed."},
    )
    height: int | None = field(
        default=None, metadata={"help": "The height of the videos in pixels (default: the model's own)."}
    )
    width: int | None = field(
        default=None, metadata={"help": "The width of the videos in pixels (default: the model's own)."}
    )
    fps: float = field(
        default=24, metadata={"help": "The number of frames per second that the videos are brought to."}
    )
    num_latent_frames: int = field(
        default=96, metadata={"help": "The length of the clips; n latent frames are 1 + 4 (n - 1) frames."}
    )
    max_chunks_per_shot: int | None = field(
        default=None, metadata={"help": "The longest shot in chunks; longer ones are cut."}
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "The number of tokens prompts are padded or cut to (default: 512 or the model's limit)."},
    )
    pad_short_videos: bool = field(
        default=True, metadata={"help": "Pad short videos, without loss on what is added; otherwise skip them."}
    )
    recache_switches: bool = field(
        default=True, metadata={"help": "Train prompt switches within a shot under the new prompt, as generated."}
    )
    vae_batch_size: int = field(default=1, metadata={"help": "The number of videos encoded at a time for the cache."})
    vae_halo: int = field(
        default=28,
        metadata={"help": "The latents that a rank encodes left of its own, with --no_cache_latents and sp_size > 1."},
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "The number of processes that read data."})


@dataclass(eq=False)
class OptimizationArguments:
    max_train_steps: int = field(default=600, metadata={"help": "The number of updates of the weights."})
    train_batch_size: int = field(
        default=1, metadata={"help": "The number of clips of each data-parallel group in a batch."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "The number of batches that make one update."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Save memory by computing the blocks twice."}
    )
    sp_size: int | None = field(
        default=None,
        metadata={
            "help": "How many processes share a clip (Balanced SP); with FSDP, set it as cp_size of the config."
        },
    )
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={"help": "Use AdamW for everything, or Muon for matrices and AdamW for the rest (not with FSDP)."},
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The learning rate after warm-up."})
    adam_beta1: float = field(default=0.0, metadata={"help": "The decay of AdamW's average of gradients."})
    adam_beta2: float = field(default=0.999, metadata={"help": "The decay of AdamW's average of squared gradients."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "The number added to AdamW's denominator."})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "The weight decay of AdamW, and of Muon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The norm that gradients are clipped to."})
    lr_scheduler: str = field(
        default="constant", metadata={"help": "The learning-rate schedule, one of diffusers.optimization."}
    )
    lr_warmup_steps: int = field(
        default=0, metadata={"help": "The number of steps until the learning rate is reached."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Keep an exponential moving average of the weights, of this decay."}
    )
    ema_start_step: int = field(default=100, metadata={"help": "The step from which weights are averaged."})
    precision: Literal["auto", "nvfp4"] = field(
        default="auto",
        metadata={
            "help": "auto follows accelerate's mixed_precision; nvfp4 also computes the linear layers of the blocks "
            "in 4 bits, or, with --rank, stores the frozen weights under the LoRA in 4 bits."
        },
    )
    nvfp4_recipe: str = field(
        default="longlive",
        metadata={"help": f"What NVFP4 training rounds, and how: {', '.join(RECIPES)}; not used with --rank."},
    )
    nvfp4_backend: Literal["auto", "te"] = field(
        default="auto",
        metadata={"help": "Who computes NVFP4: te is TransformerEngine, where it can express the recipe."},
    )
    compile: bool = field(default=False, metadata={"help": "Compile the blocks (torch.compile)."})
    attention_backend: str | None = field(
        default=None, metadata={"help": "The attention backend of diffusers, for example 'flex' or 'flash'."}
    )
    seed: int = field(default=0, metadata={"help": "The seed of the order of samples and of all that is random."})


@dataclass(eq=False)
class RunArguments:
    output_dir: str = field(metadata={"help": "The folder of the result, the checkpoints and the validation videos."})
    checkpointing_steps: int = field(default=100, metadata={"help": "The number of steps between two checkpoints."})
    checkpoints_total_limit: int | None = field(
        default=None,
        metadata={"help": "How many checkpoints are kept; older ones are deleted (default: all are kept)."},
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint-N folder, or 'latest' for the newest of OUTPUT_DIR, if any."}
    )
    validation_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "The prompts to make videos of while training; ' | ' separates the shots of one video."},
    )
    validation_steps: int = field(default=100, metadata={"help": "The number of steps between two validations."})
    validation_num_frames: int | None = field(
        default=None,
        metadata={"help": "The number of frames of the validation videos (default: the length of the clips)."},
    )
    validation_num_inference_steps: int = field(
        default=30, metadata={"help": "The number of solver steps of each chunk in validation."}
    )
    validation_guidance_scale: float = field(default=3.0, metadata={"help": "The guidance scale of validation."})
    report_to: str | None = field(
        default=None,
        metadata={"help": "The tracker, for example 'tensorboard' or 'wandb'. A jsonl log is always kept."},
    )
    tracker_name: str = field(default="longlive-ar", metadata={"help": "The name of the run for the tracker."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the result to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "The Hub repository of the result (default: the name of OUTPUT_DIR)."}
    )
    hub_token: str | None = field(
        default=None, metadata={"help": "The token for the Hub (default: the one you are logged in with)."}
    )


@dataclass(frozen=True)
class Arguments:
    """All groups of options of `train_ar.py`."""

    model: ModelArguments
    data: DataArguments
    objective: TeacherForcingSettings
    recycling: RecyclingSettings
    optimization: OptimizationArguments
    run: RunArguments


def parse_arguments(argv: list[str]) -> Arguments:
    """
    Read the command line of `train_ar.py`.

    Raises:
        ValueError: As in `parse_groups`, or if a number is out of range.
    """
    groups = parse_groups(
        (
            ModelArguments,
            DataArguments,
            TeacherForcingSettings,
            RecyclingSettings,
            OptimizationArguments,
            RunArguments,
        ),
        argv,
        description="Teacher-forcing training of LongLive-2.0 (its AR stage).",
    )
    arguments = Arguments(*groups)
    _check(arguments)
    return arguments


def parse_groups(groups: Sequence[type], argv: list[str], *, description: str) -> tuple[Any, ...]:
    """
    Read a command line into settings dataclasses; `--config FILE.yaml` anywhere in it gives defaults, which other
    options override.

    Args:
        groups: The dataclasses; each field is an option.
        argv: The arguments of the command line.
        description: What `--help` begins with.

    Raises:
        ValueError: If the file cannot be read, has options that do not exist, or `--config` is abbreviated.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path, help="A YAML file of options; options of the command line override it.")
    file = before.parse_known_args(argv)[0].config
    parser = HfArgumentParser(groups, description=description, parents=[before], formatter_class=_HelpFormatter)
    if file is not None:
        defaults = _read_yaml(file)
        known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
        unknown = sorted(set(defaults) - set(known))
        if unknown:
            raise ValueError(f"'{file}' sets options that do not exist: {', '.join(unknown)}")
        for name in defaults:
            known[name].required = False
        parser.set_defaults(**defaults)
    *settings, rest = parser.parse_args_into_dataclasses(argv)
    if rest.config != file:
        raise ValueError(f"write --config in full: '{rest.config}' was not read")
    return tuple(settings)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, unless it is None or the help already states it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        return text if action.default is None or "(default:" in text else super()._get_help_string(action)


def _read_yaml(file: Path) -> dict:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"'{file}' cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"'{file}' must hold `option: value` lines, it holds a {type(settings).__name__}")
    return settings


def _check(arguments: Arguments) -> None:
    positive = {
        arguments.optimization: (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "sp_size",
            "learning_rate",
            "max_grad_norm",
        ),
        arguments.data: ("num_latent_frames", "max_sequence_length", "vae_batch_size", "fps"),
        arguments.run: ("checkpointing_steps", "checkpoints_total_limit", "validation_steps"),
        arguments.model: ("rank", "lora_alpha", "chunk_size"),
    }
    for group, names in positive.items():
        for name in names:
            value = vars(group)[name]
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be positive, got {value}")
    schedules = [schedule.value for schedule in SchedulerType]
    if arguments.optimization.lr_scheduler not in schedules:
        raise ValueError(
            f"--lr_scheduler is one of {', '.join(schedules)}, got {arguments.optimization.lr_scheduler!r}"
        )
    recipe_named(arguments.optimization.nvfp4_recipe)
    decay = arguments.optimization.ema_decay
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"--ema_decay must be in [0, 1), got {decay}")
    if arguments.model.rank is None and arguments.model.lora_alpha is not None:
        raise ValueError(f"--lora_alpha {arguments.model.lora_alpha} needs a --rank: without one, all weights train")
