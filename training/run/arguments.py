"""The arguments of `train_ar.py`: dataclasses that `HfArgumentParser` turns into options; a YAML file may set them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from diffusers.optimization import SchedulerType
from objectives.error_recycling import RecyclingSettings
from objectives.teacher_forcing import TeacherForcingSettings
from transformers import HfArgumentParser

from longlive_diffusers.nvfp4.recipes import RECIPES, recipe_named


@dataclass(eq=False)
class ModelArguments:
    pretrained_model_name_or_path: str = field(
        metadata={"help": "Folder or Hub repository to start from: a LongLive pipeline, or a Wan one in its layout."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the repository."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the weight files, for example 'bf16'."})
    chunk_size: int | None = field(
        default=None, metadata={"help": "Latent frames that are denoised together; by default the model's own."}
    )
    rank: int | None = field(default=None, metadata={"help": "Train a LoRA of this rank instead of all weights."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the LoRA; by default its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the LoRA."})
    lora_layers: str = field(
        default=r"blocks\..*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)",
        metadata={"help": "Which layers get a LoRA, as a regular expression; by default every Linear of the blocks."},
    )


@dataclass(eq=False)
class DataArguments:
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Folder with video/ and caption/; not needed where the caches are complete."}
    )
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "Where latents and text embeddings are kept (default: OUTPUT_DIR/cache)."}
    )
    cache_latents: bool = field(
        default=True,
        metadata={"help": "Encode all videos before training; otherwise each batch when it is needed."},
    )
    height: int | None = field(default=None, metadata={"help": "Of the videos in pixels; by default the model's own."})
    width: int | None = field(default=None, metadata={"help": "Of the videos in pixels; by default the model's own."})
    fps: float = field(default=24, metadata={"help": "Frames per second that the videos are brought to."})
    num_latent_frames: int = field(
        default=96, metadata={"help": "Length of the clips; n latent frames are 1 + 4 (n - 1) frames."}
    )
    max_chunks_per_shot: int | None = field(default=None, metadata={"help": "Longer shots are cut off."})
    max_sequence_length: int = field(default=512, metadata={"help": "Tokens that prompts are padded or cut to."})
    pad_short_videos: bool = field(default=True, metadata={"help": "Pad short videos (without loss), or skip them."})
    recache_switches: bool = field(
        default=True, metadata={"help": "Train prompt switches within a shot under the new prompt, as generated."}
    )
    vae_batch_size: int = field(default=1, metadata={"help": "Videos encoded at a time for the cache."})
    vae_halo: int = field(
        default=28,
        metadata={"help": "Latents that a rank encodes left of its own, with --no_cache_latents and sp_size > 1."},
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read data."})


@dataclass(eq=False)
class ObjectiveArguments:
    weighting_scheme: Literal["longlive", "none"] = field(
        default=TeacherForcingSettings.weighting_scheme, metadata={"help": "Weight of the loss by time."}
    )
    image_probability: float = field(
        default=TeacherForcingSettings.image_probability, metadata={"help": "Of a clip whose first frame is given."}
    )
    prompt_dropout: float = field(
        default=TeacherForcingSettings.prompt_dropout,
        metadata={"help": "Probability of the empty prompt, for guidance."},
    )
    history_noise_probability: float = field(
        default=TeacherForcingSettings.history_noise_probability,
        metadata={"help": "Of a clip whose history is noised."},
    )
    history_noise_max_timestep: float = field(
        default=TeacherForcingSettings.history_noise_max_timestep,
        metadata={"help": "How much, at most; in [0, 1000]."},
    )
    multi_shot_rope_offset: float | None = field(
        default=None, metadata={"help": "Added to time positions at each cut; by default the pipeline's own."}
    )
    error_recycling: bool = field(default=False, metadata={"help": "Train on errors of past steps."})
    error_clean_probability: float = field(
        default=RecyclingSettings.clean_probability, metadata={"help": "Of a clip that no error is added to."}
    )
    error_context_probability: float = field(
        default=RecyclingSettings.context_probability, metadata={"help": "Of adding errors to the history."}
    )
    error_latent_probability: float = field(
        default=RecyclingSettings.latent_probability, metadata={"help": "Of adding them before noising."}
    )
    error_noise_probability: float = field(
        default=RecyclingSettings.noise_probability, metadata={"help": "Of adding them to the noise."}
    )
    error_update_probability: float = field(
        default=RecyclingSettings.update_probability, metadata={"help": "Of keeping those of a clean clip."}
    )
    error_num_buckets: int = field(
        default=RecyclingSettings.num_buckets, metadata={"help": "Classes of time that errors are kept in."}
    )
    error_bucket_size: int = field(
        default=RecyclingSettings.bucket_size, metadata={"help": "Errors of a class, each of one chunk."}
    )
    error_warmup_steps: int = field(
        default=RecyclingSettings.warmup_steps, metadata={"help": "Steps that only collect errors."}
    )


@dataclass(eq=False)
class OptimizationArguments:
    max_train_steps: int = field(default=600, metadata={"help": "Updates of the weights."})
    train_batch_size: int = field(default=1, metadata={"help": "Clips of each data-parallel group."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of an update."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Save memory, compute blocks twice."})
    sp_size: int | None = field(
        default=None,
        metadata={"help": "Processes that share a clip (Balanced SP); with FSDP set it as cp_size of the config."},
    )
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw", metadata={"help": "muon: for matrices, with AdamW for the rest (`muon.py`); not with FSDP."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Of the optimiser."})
    adam_beta1: float = field(default=0.0, metadata={"help": "Of AdamW."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Of AdamW."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Of AdamW."})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW, and of Muon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    lr_scheduler: str = field(default="constant", metadata={"help": "A schedule of diffusers.optimization."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps until the learning rate is reached."})
    ema_decay: float | None = field(default=None, metadata={"help": "Keep an average of the weights, of this decay."})
    ema_start_step: int = field(default=100, metadata={"help": "Step from which it averages."})
    precision: Literal["auto", "nvfp4"] = field(
        default="auto",
        metadata={
            "help": "auto: as accelerate's mixed_precision says. nvfp4: besides, the linear layers of the blocks "
            "compute in 4 bits; with --rank, the frozen weights under the LoRA are stored in them."
        },
    )
    nvfp4_recipe: str = field(
        default="longlive", metadata={"help": f"What is rounded how: {', '.join(RECIPES)}; not used with --rank."}
    )
    nvfp4_backend: Literal["auto", "te"] = field(
        default="auto", metadata={"help": "te: TransformerEngine computes, where it can express the recipe."}
    )
    compile: bool = field(default=False, metadata={"help": "Compile the blocks (torch.compile)."})
    attention_backend: str | None = field(
        default=None, metadata={"help": "Backend of attention, for example 'flex' or 'flash'; see diffusers."}
    )
    seed: int = field(default=0, metadata={"help": "Of the order of samples and of all that is random."})


@dataclass(eq=False)
class RunArguments:
    output_dir: str = field(metadata={"help": "Where the result, checkpoints and validation videos go."})
    checkpointing_steps: int = field(default=100, metadata={"help": "Steps between two checkpoints."})
    checkpoints_total_limit: int | None = field(default=None, metadata={"help": "Older checkpoints are deleted."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint-N folder, or 'latest' for the newest of OUTPUT_DIR, if any."}
    )
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Make videos of these; shots of one video are separated by ' | '."}
    )
    validation_steps: int = field(default=100, metadata={"help": "Steps between two validations."})
    validation_num_frames: int | None = field(default=None, metadata={"help": "Default: the length of the clips."})
    validation_num_inference_steps: int = field(default=30, metadata={"help": "Solver steps of validation."})
    validation_guidance_scale: float = field(default=3.0, metadata={"help": "Guidance of validation."})
    report_to: str | None = field(
        default=None, metadata={"help": "Tracker, for example 'tensorboard' or 'wandb'. A jsonl log is always kept."}
    )
    tracker_name: str = field(default="longlive-ar", metadata={"help": "Name of the run for the tracker."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the result."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Default: the name of OUTPUT_DIR."})
    hub_token: str | None = field(default=None, metadata={"help": "Default: the one you are logged in with."})


@dataclass(frozen=True)
class Arguments:
    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    optimization: OptimizationArguments
    run: RunArguments


def parse_arguments(argv: list[str]) -> Arguments:
    """
    Read the command line; `--config FILE.yaml` anywhere in it gives defaults, which other options override.

    Raises:
        ValueError: The file cannot be read, has options that do not exist, or a number is out of range.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ObjectiveArguments, OptimizationArguments, RunArguments),
        description="Teacher-forcing training of LongLive-2.0 (its AR stage).",
    )
    parser.add_argument("--config", type=Path, help="YAML file of options; those of the command line go first.")
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    file = _config_of(argv)
    if file is not None:
        settings = _read_yaml(file)
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"'{file}' sets options that do not exist: {', '.join(unknown)}")
        for name in settings:
            known[name].required = False
        parser.set_defaults(**settings)
    *parts, _ = parser.parse_args_into_dataclasses(argv)
    arguments = Arguments(*parts)
    _check(arguments)
    return arguments


def _config_of(argv: list[str]) -> Path | None:
    for index, word in enumerate(argv):
        if word == "--config" and index + 1 < len(argv):
            return Path(argv[index + 1])
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


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
