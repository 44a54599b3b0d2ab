"""The accelerator of a run, whose configuration is the user's: what it cannot have is refused."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from run.agreement import check_processes
from run.arguments import RunArguments
from run.precision import keep_inputs_in_float32


# Processes wait for the main one while it looks at all clips, or makes validation videos, for hours perhaps. By
# default, NCCL ends a run after ten minutes of that.
LONGEST_WAIT = timedelta(days=1)
NOT_SUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def build_accelerator(run: RunArguments, gradient_accumulation_steps: int = 1) -> Accelerator:
    """
    Return the accelerator of a run.

    Args:
        run: Where the run writes, and what it reports to.
        gradient_accumulation_steps: How many batches accelerate itself is to accumulate.

    Raises:
        ValueError: If accelerate is configured for something that the scripts cannot do, or would do otherwise.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=run.report_to,
        project_config=ProjectConfiguration(project_dir=str(run.output), logging_dir=str(run.output / "logs")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    check_processes(accelerator)
    check_configuration(accelerator, gradient_accumulation_steps)
    keep_inputs_in_float32(accelerator)
    return accelerator


def check_configuration(accelerator: Accelerator, gradient_accumulation_steps: int) -> None:
    """Raise a ValueError if accelerate's configuration, from its files, the command line of `accelerate launch` or the
    environment, has FSDP 1, DeepSpeed or Megatron, or accumulates other batches than the script does."""
    kind = accelerator.distributed_type
    if kind in NOT_SUPPORTED:
        raise ValueError(
            f"accelerate is configured for {kind.value}, with which the scripts do not work: use DDP, or FSDP with "
            "fsdp_version: 2, as in training/configs/eight_gpus.yaml"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "accelerate is configured for FSDP 1, its default: set fsdp_version: 2, as in "
            "training/configs/eight_gpus.yaml (--fsdp_version 2 of accelerate launch)"
        )
    found = accelerator.gradient_accumulation_steps
    if found != gradient_accumulation_steps:
        raise ValueError(
            f"accelerate is configured to accumulate {found} batches (--gradient_accumulation_steps of accelerate "
            "launch, which sets ACCELERATE_GRADIENT_ACCUMULATION_STEPS): leave that out, and give "
            "--gradient_accumulation_steps to the script"
        )
