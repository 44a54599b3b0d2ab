"""Checkpoints of a run: complete or not there, found again, and pruned.

A checkpoint is written under another name and renamed when every process has written its part; what a killed run left
half-written is removed at the next start. Beside what accelerate keeps (weights, optimiser, random states) it holds
the step, the learning-rate schedule, the averaged weights and the error buffers. The order of samples and their noise
need no saving: they are functions of the seed and the step.
"""

import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from objectives.error_recycling import ErrorBuffer
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler


PREFIX = "checkpoint-"
PARTIAL = ".partial"


class Checkpoints:
    """
    Args:
        accelerator: Its prepared models and optimisers are saved.
        folder: The run's output.
        lr_scheduler, ema, errors: What else is saved; the last two where there are any.
        total_limit: How many checkpoints to keep; None: all.
        identity: What a run must have in common with the one that it goes on with, by name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        lr_scheduler: LRScheduler,
        ema: EMAModel | None,
        errors: ErrorBuffer | None,
        total_limit: int | None,
        identity: dict[str, str | int | float | bool | None],
    ):
        self.accelerator, self.folder, self.total_limit = accelerator, folder, total_limit
        self.lr_scheduler, self.ema, self.errors, self.identity = lr_scheduler, ema, errors, identity

    def save(self, step: int) -> Path:
        """Write `checkpoint-<step>`, after so many updates. Every process has to call it."""
        accelerator = self.accelerator
        final = self.folder / f"{PREFIX}{step}"
        partial = self.folder / f"{PREFIX}{step}{PARTIAL}"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        state = {"step": step, "identity": self.identity, "lr_scheduler": self.lr_scheduler.state_dict()}
        if self.errors is not None:
            state["errors"] = self.errors.state_dict()
        if self.ema is not None and (self._ema_is_sharded or accelerator.is_main_process):
            state["ema"] = {
                "optimization_step": self.ema.optimization_step,
                "shadow": [_local(tensor) for tensor in self.ema.shadow_params],
            }
        torch.save(state, partial / _state_name(accelerator.process_index))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            remove(final)
            partial.rename(final)
            self._prune()
        accelerator.wait_for_everyone()
        return final

    def load(self, checkpoint: Path) -> int:
        """Go on from a checkpoint. Every process has to call it.

        Returns:
            The updates that were made.

        Raises:
            ValueError: It is no checkpoint, or that of a run with other settings (they are named).
        """
        accelerator = self.accelerator
        path = checkpoint / _state_name(accelerator.process_index)
        if not path.is_file():
            raise ValueError(
                f"'{checkpoint}' has no {path.name}: it is no checkpoint of this script, or one of fewer processes "
                f"than {accelerator.num_processes}"
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, UnpicklingError, EOFError) as error:
            raise ValueError(f"'{path}' is damaged, {path.stat().st_size} bytes: resume from another one") from error
        differing = [
            f"{name} is {state['identity'].get(name)} there and {value} here"
            for name, value in self.identity.items()
            if state["identity"].get(name) != value
        ]
        if differing:
            raise ValueError(f"'{checkpoint}' is of another run: {'; '.join(differing)}")
        accelerator.load_state(str(checkpoint))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.errors is not None:
            self.errors.load_state_dict(state["errors"])
        if self.ema is not None:
            if "ema" not in state:
                state = torch.load(checkpoint / _state_name(0), map_location="cpu", weights_only=True)
            self.ema.optimization_step = state["ema"]["optimization_step"]
            for shadow, saved in zip(self.ema.shadow_params, state["ema"]["shadow"], strict=True):
                _local(shadow).copy_(saved)
        accelerator.wait_for_everyone()
        return state["step"]

    @property
    def _ema_is_sharded(self) -> bool:
        return any(isinstance(tensor, DTensor) for tensor in self.ema.shadow_params)

    def _prune(self) -> None:
        if self.total_limit is not None:
            for path in find_checkpoints(self.folder)[: -self.total_limit]:
                remove(path)


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def remove_partial(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder.glob(f"{PREFIX}*{PARTIAL}"):
        shutil.rmtree(path)


def resolve_checkpoint(folder: Path, wanted: str | None) -> Path | None:
    """
    Args:
        folder: The run's output.
        wanted: A checkpoint's folder, its name in `folder`, "latest", or None.

    Returns:
        The folder; None where none was wanted, or "latest" of a run that has none yet.

    Raises:
        ValueError: There is no such checkpoint (those that there are, are named).
    """
    if wanted is None:
        return None
    there = find_checkpoints(folder)
    if wanted == "latest":
        return there[-1] if there else None
    for path in (Path(wanted), folder / wanted):
        if path.is_dir():
            return path
    names = ", ".join(path.name for path in there) or "none"
    raise ValueError(f"There is no checkpoint '{wanted}'; '{folder}' has: {names}")


def remove(path: Path) -> None:
    """Remove a checkpoint; half removed, it does not pass for a whole one."""
    if path.exists():
        doomed = path.with_name(path.name + PARTIAL)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that FSDP has sharded; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _state_name(process: int) -> str:
    return f"training_state_{process}.pt"
