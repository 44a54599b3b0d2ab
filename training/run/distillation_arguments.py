"""The arguments of `train_dmd.py`: those of `arguments.py` with other defaults, and what only distillation needs."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from objectives.distillation import DistillationSettings
from run.allowed import FRACTION, NOT_NEGATIVE, POSITIVE
from run.arguments import (
    ModelArguments,
    OptimizationArguments,
    PromptDataArguments,
    RunArguments,
    check_arguments,
)
from run.command_line import PATH, parse_groups
from run.unused_options import DISTILLATION_NEEDS


@dataclass(eq=False)
class NetworkArguments(ModelArguments):
    rank: Annotated[int | None, POSITIVE] = field(
        default=128, metadata={"help": "The rank of the LoRAs; a --generator_lora keeps its own."}
    )
    train_all_weights: bool = field(
        default=False,
        metadata={"help": "Train all weights of the generator and of the fake score, instead of LoRAs."},
    )
    generator_lora: Annotated[str | None, PATH] = field(
        default=None,
        metadata={"help": "A LoRA that the generator begins with: file, folder or Hub repository (default: none)."},
    )
    teacher_model_name_or_path: Annotated[str | None, PATH] = field(
        default=None,
        metadata={"help": "The pipeline whose transformer is the real score (default: the model to start from)."},
    )
    ar_model_name_or_path: Annotated[str | None, PATH] = field(
        default=None,
        metadata={
            "help": "With a standalone start, the autoregressive pipeline that the LoRA is put onto: it makes the "
            "validation videos, and the card of the result names it."
        },
    )
    save_original_lora: bool = field(
        default=False,
        metadata={"help": "Also save the LoRA as the reference implementation does, in generator_lora.pt."},
    )

    def __post_init__(self):
        if self.train_all_weights:
            self.rank = None


@dataclass(eq=False)
class DistillationOptimizationArguments(OptimizationArguments):
    max_train_steps: Annotated[int, POSITIVE] = field(
        default=5000, metadata={"help": "The number of updates of the fake score, some of which update the generator."}
    )
    learning_rate: Annotated[float, POSITIVE] = field(
        default=1e-5, metadata={"help": "The learning rate of the generator after warm-up."}
    )
    critic_learning_rate: Annotated[float, POSITIVE] = field(
        default=2e-6, metadata={"help": "The learning rate of the fake score after warm-up."}
    )
    max_grad_norm: Annotated[float, POSITIVE] = field(
        default=10.0, metadata={"help": "The norm that gradients are clipped to."}
    )
    precision: Literal["auto", "nvfp4"] = field(
        default="auto",
        metadata={
            "help": "auto follows accelerate's mixed_precision; nvfp4 also stores the frozen weights under the LoRAs "
            "in 4 bits or, with --train_all_weights, computes the linear layers of the blocks in 4 bits."
        },
    )
    ema_decay: Annotated[float | None, FRACTION] = field(
        default=None, metadata={"help": "Keep an exponential moving average of the generator, of this decay."}
    )
    ema_start_step: Annotated[int, NOT_NEGATIVE] = field(
        default=0, metadata={"help": "The update of the generator from which its weights are averaged."}
    )


@dataclass(eq=False)
class DistillationRunArguments(RunArguments):
    validation_num_inference_steps: Annotated[int | None, POSITIVE] = field(
        default=None, metadata={"help": "The number of solver steps in validation (default: --num_inference_steps)."}
    )
    validation_guidance_scale: Annotated[float, NOT_NEGATIVE] = field(
        default=1.0, metadata={"help": "The guidance scale of validation; 1 is none."}
    )
    tracker_name: str = field(default="longlive-dmd", metadata={"help": "The name of the run for the tracker."})


@dataclass(frozen=True)
class DistillationArguments:
    """All groups of options of `train_dmd.py`."""

    model: NetworkArguments
    data: PromptDataArguments
    distillation: DistillationSettings
    optimization: DistillationOptimizationArguments
    run: DistillationRunArguments

    @property
    def generator_optimization(self) -> OptimizationArguments:
        """The settings of the generator's optimizer; it has an update in every n-th step."""
        steps = self.generator_updates(self.optimization.max_train_steps)
        return replace(self.optimization, max_train_steps=steps)

    @property
    def critic_optimization(self) -> OptimizationArguments:
        """The settings of the fake score's optimizer."""
        return replace(self.optimization, learning_rate=self.optimization.critic_learning_rate)

    def generator_updates(self, step: int) -> int:
        """Return the number of updates of the generator in the first `step` steps."""
        return -(-step // self.distillation.generator_interval)


def parse_distillation_arguments(argv: list[str]) -> DistillationArguments:
    """
    Read the command line of `train_dmd.py`.

    Raises:
        ValueError: As in `parse_groups` and `check_arguments`, or if settings do not go together.
    """
    groups = parse_groups(
        (
            NetworkArguments,
            PromptDataArguments,
            DistillationSettings,
            DistillationOptimizationArguments,
            DistillationRunArguments,
        ),
        argv,
        description="Distribution-matching distillation of LongLive-2.0, to few steps and no guidance.",
        needs=DISTILLATION_NEEDS,
    )
    arguments = DistillationArguments(*groups)
    _check(arguments)
    if arguments.run.validation_num_inference_steps is None:
        arguments.run.validation_num_inference_steps = arguments.distillation.num_inference_steps
    return arguments


def _check(arguments: DistillationArguments) -> None:
    model, settings, run = arguments.model, arguments.distillation, arguments.run
    check_arguments(vars(arguments).values(), model, arguments.optimization, run)
    if model.lora_dropout:
        raise ValueError(
            f"--lora_dropout {model.lora_dropout}: distillation trains on what the generator makes, without dropout"
        )
    if model.train_all_weights and (model.generator_lora is not None or model.save_original_lora):
        raise ValueError("--train_all_weights trains no LoRA: --generator_lora and --save_original_lora need one")
    if settings.image_probability != 1 and not arguments.data.image_conditioning:
        raise ValueError(f"--image_probability {settings.image_probability} needs --image_conditioning true")
    if model.ar_model_name_or_path is not None and settings.start == "direct":
        raise ValueError("--ar_model_name_or_path is for --start standalone: a direct start is the model itself")
    if run.validation_prompts and settings.start == "standalone" and model.ar_model_name_or_path is None:
        raise ValueError(
            "--start standalone makes a LoRA for an autoregressive model: --validation_prompts need it as "
            "--ar_model_name_or_path"
        )
    if model.train_all_weights and settings.start == "standalone":
        raise ValueError("--start standalone makes a LoRA for another model, --train_all_weights makes none")
    if arguments.optimization.compile:
        raise ValueError("--compile is not possible here: adapters are switched in every step, and compiled anew")
