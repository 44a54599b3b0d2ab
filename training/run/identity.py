"""What a run was started with: what must not change when it is resumed, and all settings that it depends on."""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator

from run.arguments import ModelArguments, OptimizationArguments
from run.history import Setting
from run.precision import precision_name
from run.process_mesh import ProcessMesh


# How fast data is read, and where it is kept, changes no result.
WITHOUT_EFFECT = ("data_cache_dir", "dataloader_num_workers", "vae_batch_size")


def common_identity(
    model: ModelArguments, optimization: OptimizationArguments, mesh: ProcessMesh, num_samples: int
) -> dict[str, Setting]:
    """Return what must not change when a run of any script is resumed. This includes the number of processes, because
    each process has its own part of the random states, and of what it has collected."""
    return {
        "seed": optimization.seed,
        "batch": optimization.train_batch_size * mesh.dp_size,
        "gradient_accumulation_steps": optimization.gradient_accumulation_steps,
        "num_samples": num_samples,
        "rank": model.rank,
        "lora_alpha": model.lora_alpha,
        "lora_layers": model.lora_layers if model.rank is not None else None,
        "optimizer": optimization.optimizer if optimization.optimizer == "adamw" else "torch.optim.Muon",
        "precision": optimization.precision,
        "nvfp4_recipe": optimization.nvfp4_recipe if optimization.precision == "nvfp4" else None,
        "ema_decay": optimization.ema_decay,
        "processes": mesh.dp_size * mesh.sp_size,
        "sp_size": mesh.sp_size,
    }


def settings_in(groups: Iterable[Any], accelerator: Accelerator) -> dict[str, Setting]:
    """Return all settings of some dataclasses that a result depends on, by name, and the precision it was computed
    in."""
    settings = {name: value for group in groups for name, value in vars(group).items() if name not in WITHOUT_EFFECT}
    return settings | {"mixed_precision": precision_name(accelerator)}
