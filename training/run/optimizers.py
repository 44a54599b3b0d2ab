"""The optimizers of a run: AdamW for everything, or Muon for matrices with AdamW for the rest.

A matrix's gradient is dominated by a few directions. Muon takes the momentum's singular vectors and sets all singular
values to about one, so that rare directions are learned as fast as common ones (K. Jordan et al., "Muon: an optimizer
for hidden layers in neural networks", 2024; scaled as in arXiv 2502.16982, so that AdamW's learning rates fit). On
the toy world it needs little more than half of AdamW's steps. PyTorch's Muon takes matrices only, so the parameters
are divided, and the run has two optimizers, two schedules, and both of their states in its checkpoints.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from run.arguments import OptimizationArguments
from run.muon import Muon


MUON_MOMENTUM = 0.95


def build_optimizers(
    parameters: list[torch.nn.Parameter], accelerator: Accelerator, options: OptimizationArguments
) -> list[Optimizer]:
    """
    Build the optimizers of a run.

    Args:
        parameters: The parameters that are trained.
        accelerator: The accelerator of the run, which knows whether parameters are sharded.
        options: The optimizer to use, and its settings.
    """
    if options.optimizer == "adamw":
        return [_adamw(parameters, accelerator, options)]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    others = [parameter for parameter in parameters if parameter.ndim != 2]
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(
            Muon(
                matrices,
                lr=options.learning_rate,
                weight_decay=options.adam_weight_decay,
                momentum=MUON_MOMENTUM,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if others:
        optimizers.append(_adamw(others, accelerator, options))
    return optimizers


def check_optimizer(accelerator: Accelerator, options: OptimizationArguments) -> None:
    """Raise a ValueError for Muon with FSDP, under which no process has a whole matrix."""
    if options.optimizer == "muon" and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("--optimizer muon needs whole matrices, and FSDP shards them: use adamw")


def build_schedules(optimizers: list[Optimizer], options: OptimizationArguments, step: int = 0) -> list[LRScheduler]:
    """
    Build the learning-rate schedule of each optimizer, after `step` updates. They are stepped together, once for each
    update.

    The optimizers get the settings of `options`: those of a checkpoint that was loaded into them may be others.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group |= {"initial_lr": options.learning_rate, "weight_decay": options.adam_weight_decay}
            if "betas" in group:  # AdamW's
                group |= {"betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon}
    return [
        get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.max_train_steps,
            last_epoch=step - 1,  # the last one whose rate was used
        )
        for optimizer in optimizers
    ]


def _adamw(
    parameters: list[torch.nn.Parameter], accelerator: Accelerator, options: OptimizationArguments
) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
        # One pass over the numbers of a weight. The default computes in temporaries as large as the weights, on a GPU
        # 20 GB for 5 billion, and takes 4 times as long on a CPU.
        fused=True if accelerator.device.type in ("cuda", "cpu") else None,
    )
