"""The arguments of the training scripts: settings dataclasses that `HfArgumentParser` turns into options, which a YAML
file may set. Each setting is defined once: as a field of its dataclass, with its range, its default and its help."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from longlive_diffusers.nvfp4.recipes import RECIPES, recipe_named
from longlive_diffusers.user_path import user_path
from objectives.error_recycling import RecyclingSettings
from objectives.teacher_forcing import TeacherForcingSettings
from run.allowed import FRACTION, FRAME_RATE, NOT_NEGATIVE, POSITIVE, SEED, check_settings
from run.command_line import PATH, parse_groups
from run.unused_options import TEACHER_FORCING_NEEDS


POLYNOMIAL_END = 1e-7  # the last learning rate of diffusers' polynomial schedule


@dataclass(eq=False)
class ModelArguments:
    pretrained_model_name_or_path: Annotated[str, PATH] = field(
        metadata={
            "help": "The folder or Hub repository to start from: a LongLive pipeline, or a Wan one in its layout."
        }
    )
    revision: str | None = field(default=None, metadata={"help": "The branch, tag or commit of the Hub repository."})
    variant: str | None = field(
        default=None, metadata={"help": "The variant of the weight files, for example 'bf16'."}
    )
    chunk_size: Annotated[int | None, POSITIVE] = field(
        default=None,
        metadata={"help": "The number of latent frames that are denoised together (default: the model's own)."},
    )
    rank: Annotated[int | None, POSITIVE] = field(
        default=None, metadata={"help": "Train a LoRA of this rank instead of all weights."}
    )
    lora_alpha: Annotated[int | None, POSITIVE] = field(
        default=None, metadata={"help": "The scale of the LoRA (default: its rank)."}
    )
    lora_dropout: Annotated[float, FRACTION] = field(
        default=0.0, metadata={"help": "The dropout probability of the LoRA."}
    )
    lora_layers: str = field(
        default=r"blocks\..*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)",
        metadata={
            "help": "The layers that get a LoRA, as a regular expression (default: every Linear of the blocks)."
        },
    )


@dataclass(eq=False)
class EncodingArguments:
    """How a training set is read and encoded, whatever it is used for."""

    train_data_dir: Annotated[str | None, PATH] = field(
        default=None,
        metadata={"help": "The folder of the training set; not needed where the caches are complete."},
    )
    caption_column: str | None = field(
        default=None,
        metadata={"help": "The captions of a list of clips (default: the one there is of caption, text and prompt)."},
    )
    data_cache_dir: Annotated[str | None, PATH] = field(
        default=None,
        metadata={"help": "The folder where latents and text embeddings are kept (default: OUTPUT_DIR/cache)."},
    )
    height: Annotated[int | None, POSITIVE] = field(
        default=None, metadata={"help": "The height of the videos in pixels (default: the model's own)."}
    )
    width: Annotated[int | None, POSITIVE] = field(
        default=None, metadata={"help": "The width of the videos in pixels (default: the model's own)."}
    )
    fps: Annotated[float, FRAME_RATE] = field(
        default=24, metadata={"help": "The number of frames per second that the videos are brought to."}
    )
    num_latent_frames: Annotated[int, POSITIVE] = field(
        default=96, metadata={"help": "The length of the clips; n latent frames are 1 + 4 (n - 1) frames."}
    )
    max_sequence_length: Annotated[int | None, POSITIVE] = field(
        default=None,
        metadata={"help": "The number of tokens prompts are padded or cut to (default: 512 or the model's limit)."},
    )
    vae_batch_size: Annotated[int, POSITIVE] = field(
        default=1, metadata={"help": "The number of videos encoded at a time for the cache."}
    )
    dataloader_num_workers: Annotated[int, NOT_NEGATIVE] = field(
        default=0, metadata={"help": "The number of processes that read data."}
    )


@dataclass(eq=False)
class DataArguments(EncodingArguments):
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "The training set on the Hub, in place of a folder; needs the package datasets."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of the Hub data set, if it has several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "The part of the Hub data set."})
    cache_latents: bool = field(
        default=True,
        metadata={"help": "Encode all videos before training; otherwise, each batch is encoded when it is needed."},
    )
    max_chunks_per_shot: Annotated[int | None, POSITIVE] = field(
        default=None, metadata={"help": "The longest shot in chunks; longer ones are cut."}
    )
    pad_short_videos: bool = field(
        default=True, metadata={"help": "Pad short videos, without loss on what is added; otherwise skip them."}
    )
    recache_switches: bool = field(
        default=True, metadata={"help": "Train prompt switches within a shot under the new prompt, as generated."}
    )
    vae_halo: Annotated[int, NOT_NEGATIVE] = field(
        default=28,
        metadata={"help": "The latents that a rank encodes left of its own, with --no_cache_latents and sp_size > 1."},
    )


@dataclass(eq=False)
class PromptDataArguments(EncodingArguments):
    """The data of distillation: prompts, and images to begin from if they are asked for."""

    prompts: Annotated[str | None, PATH] = field(
        default=None,
        metadata={
            "help": "What videos are made of: a .txt or .jsonl file with a video on each line, or a training set, of "
            "which only the captions are read."
        },
    )
    image_conditioning: bool = field(
        default=False,
        metadata={"help": "Continue from the first frames of the videos of --train_data_dir, under their captions."},
    )
    train_data_dir: Annotated[str | None, PATH] = field(
        default=None,
        metadata={"help": "The training set that --image_conditioning takes first frames and captions from."},
    )
    num_latent_frames: Annotated[int, POSITIVE] = field(
        default=96, metadata={"help": "The length of the videos that are made while training, in latent frames."}
    )


@dataclass(eq=False)
class OptimizationArguments:
    max_train_steps: Annotated[int, POSITIVE] = field(
        default=600, metadata={"help": "The number of updates of the weights."}
    )
    train_batch_size: Annotated[int, POSITIVE] = field(
        default=1, metadata={"help": "The number of clips of each data-parallel group in a batch."}
    )
    gradient_accumulation_steps: Annotated[int, POSITIVE] = field(
        default=1, metadata={"help": "The number of batches that make one update."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Save memory by computing the blocks twice."}
    )
    activation_offloading: bool = field(
        default=False,
        metadata={
            "help": "Keep the inputs of the blocks, which --gradient_checkpointing computes them from again, in the "
            "memory of the host."
        },
    )
    sp_size: Annotated[int | None, POSITIVE] = field(
        default=None,
        metadata={
            "help": "How many processes share a clip (Balanced SP); with FSDP, set it as cp_size of the config."
        },
    )
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={"help": "Use AdamW for everything, or Muon for matrices and AdamW for the rest (not with FSDP)."},
    )
    learning_rate: Annotated[float, POSITIVE] = field(
        default=1e-5, metadata={"help": "The learning rate after warm-up."}
    )
    adam_beta1: Annotated[float, FRACTION] = field(
        default=0.0, metadata={"help": "The decay of AdamW's average of gradients."}
    )
    adam_beta2: Annotated[float, FRACTION] = field(
        default=0.999, metadata={"help": "The decay of AdamW's average of squared gradients."}
    )
    adam_epsilon: Annotated[float, POSITIVE] = field(
        default=1e-8, metadata={"help": "The number added to AdamW's denominator."}
    )
    adam_weight_decay: Annotated[float, NOT_NEGATIVE] = field(
        default=0.0, metadata={"help": "The weight decay of AdamW, and of Muon."}
    )
    max_grad_norm: Annotated[float, POSITIVE] = field(
        default=1.0, metadata={"help": "The norm that gradients are clipped to."}
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = field(default="constant", metadata={"help": "The learning-rate schedule, one of diffusers.optimization."})
    lr_warmup_steps: Annotated[int, NOT_NEGATIVE] = field(
        default=0, metadata={"help": "The number of steps until the learning rate is reached."}
    )
    ema_decay: Annotated[float | None, FRACTION] = field(
        default=None, metadata={"help": "Keep an exponential moving average of the weights, of this decay."}
    )
    ema_start_step: Annotated[int, NOT_NEGATIVE] = field(
        default=100, metadata={"help": "The step from which weights are averaged."}
    )
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
    seed: Annotated[int, SEED] = field(
        default=0, metadata={"help": "The seed of the order of samples and of all that is random."}
    )


@dataclass(eq=False)
class RunArguments:
    output_dir: Annotated[str, PATH] = field(
        metadata={"help": "The folder of the result, the checkpoints and the validation videos."}
    )
    checkpointing_steps: Annotated[int, POSITIVE] = field(
        default=100, metadata={"help": "The number of steps between two checkpoints."}
    )
    checkpoints_total_limit: Annotated[int | None, POSITIVE] = field(
        default=None,
        metadata={"help": "How many checkpoints are kept; older ones are deleted (default: all are kept)."},
    )
    resume_from_checkpoint: Annotated[str | None, PATH] = field(
        default=None, metadata={"help": "A checkpoint-N folder, or 'latest' for the newest of OUTPUT_DIR, if any."}
    )
    validation_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "The prompts to make videos of while training; ' | ' separates the shots of one video."},
    )
    validation_steps: Annotated[int, POSITIVE] = field(
        default=100, metadata={"help": "The number of steps between two validations."}
    )
    validation_num_frames: Annotated[int | None, POSITIVE] = field(
        default=None,
        metadata={"help": "The number of frames of the validation videos (default: the length of the clips)."},
    )
    validation_num_inference_steps: Annotated[int, POSITIVE] = field(
        default=30, metadata={"help": "The number of solver steps of each chunk in validation."}
    )
    validation_guidance_scale: Annotated[float, NOT_NEGATIVE] = field(
        default=3.0, metadata={"help": "The guidance scale of validation."}
    )
    report_to: str | None = field(
        default=None,
        metadata={"help": "The tracker, for example 'tensorboard' or 'wandb', or 'none'. A jsonl log is always kept."},
    )
    tracker_name: str = field(default="longlive-ar", metadata={"help": "The name of the run for the tracker."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the result to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "The Hub repository of the result (default: the name of OUTPUT_DIR)."}
    )
    hub_token: str | None = field(
        default=None, metadata={"help": "The token for the Hub (default: the one you are logged in with)."}
    )

    def __post_init__(self):
        if self.report_to == "none":
            self.report_to = None

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return user_path(self.output_dir)

    @property
    def repo_name(self) -> str:
        """The name of the result: what the Hub repository is to be called."""
        return self.hub_model_id or self.output.resolve().name


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
        ValueError: As in `parse_groups` and `check_settings`, or if settings do not go together.
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
        needs=TEACHER_FORCING_NEEDS,
    )
    arguments = Arguments(*groups)
    check_arguments(vars(arguments).values(), arguments.model, arguments.optimization, arguments.run)
    return arguments


def check_arguments(
    groups: Iterable[Any], model: ModelArguments, optimization: OptimizationArguments, run: RunArguments
) -> None:
    """
    Check the settings of a script.

    Args:
        groups: All of its settings.
        model, optimization, run: Those among them that every script has.

    Raises:
        ValueError: For a number that is out of range, or settings that do not go together.
    """
    check_settings(groups)
    _check_schedule(optimization)
    if optimization.activation_offloading and not optimization.gradient_checkpointing:
        raise ValueError("--activation_offloading moves what --gradient_checkpointing keeps: set both")
    recipe_named(optimization.nvfp4_recipe)
    try:
        re.compile(model.lora_layers)
    except re.error as error:
        raise ValueError(f"--lora_layers {model.lora_layers!r} is no regular expression: {error}") from error
    if run.push_to_hub or run.hub_model_id is not None:
        try:
            validate_repo_id(run.repo_name)
        except HFValidationError as error:
            raise ValueError(f"--hub_model_id: {error}") from error


def _check_schedule(options: OptimizationArguments) -> None:
    """Raise a ValueError for a schedule that would leave out the warm-up, or could not be computed."""
    schedule, warmup = options.lr_scheduler, options.lr_warmup_steps
    if schedule == "constant" and warmup:
        raise ValueError(f"--lr_scheduler constant has no warm-up: for {warmup} steps of it, use constant_with_warmup")
    if schedule != "polynomial":
        return
    if warmup >= options.max_train_steps:
        raise ValueError(
            f"--lr_scheduler polynomial needs fewer steps of warm-up than there are in all: --lr_warmup_steps is "
            f"{warmup}, --max_train_steps {options.max_train_steps}"
        )
    if options.learning_rate <= POLYNOMIAL_END:
        raise ValueError(
            f"--lr_scheduler polynomial falls to {POLYNOMIAL_END}: --learning_rate must be higher, got "
            f"{options.learning_rate}"
        )
