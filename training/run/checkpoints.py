"""Checkpoints of a run: written completely or not at all, found again, and pruned.

A checkpoint is written under another name and renamed when every process has written its part; what a killed run left
half-written is removed at the next start. Besides what accelerate saves (weights, optimizers, random states) it holds
the step and any number of named states: schedules, averaged weights, error buffers. The order of samples and their
noise need no saving: they are functions of the seed and the step.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor

from longlive_diffusers.atomic_write import remove_unfinished


PREFIX = "checkpoint-"
PARTIAL = ".partial"


class Stateful(Protocol):
    """Anything whose state can be saved and loaded: schedules, buffers, averages."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class EMAState:
    """The state of averaged weights; if FSDP shards them, of this process's part."""

    def __init__(self, ema: EMAModel):
        self.ema = ema

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a part of its own."""
        return any(isinstance(tensor, DTensor) for tensor in self.ema.shadow_params)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the averages."""
        return {
            "optimization_step": self.ema.optimization_step,
            "shadow": [_local(tensor) for tensor in self.ema.shadow_params],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.ema.optimization_step = state["optimization_step"]
        for shadow, saved in zip(self.ema.shadow_params, state["shadow"], strict=True):
            _local(shadow).copy_(saved)


class Checkpoints:
    """
    Args:
        accelerator: The accelerator whose prepared models and optimizers are saved.
        folder: The output folder of the run.
        states: The further states to save, by name; each process writes its own.
        shared_states: The further states that are the same in every process; the first one writes them for all.
        total_limit: The number of checkpoints to keep; None to keep all.
        identity: The settings that a run must have in common with the run that it resumes, by name.

    Raises:
        ValueError: If two states have the same name, or one that the checkpoint itself uses.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        states: Mapping[str, Stateful],
        shared_states: Mapping[str, Stateful],
        total_limit: int | None,
        identity: dict[str, str | int | float | bool | None],
    ):
        self.accelerator, self.folder, self.total_limit = accelerator, folder, total_limit
        self.states, self.shared_states, self.identity = dict(states), dict(shared_states), identity
        names = ["step", "identity", *self.states, *self.shared_states]
        if len(set(names)) < len(names):
            raise ValueError(f"The states of a checkpoint need names of their own, got {', '.join(names)}")

    def save(self, step: int) -> Path:
        """Write `checkpoint-<step>`, after `step` updates. Every process has to call this."""
        accelerator = self.accelerator
        final = self.folder / f"{PREFIX}{step}"
        partial = self.folder / f"{PREFIX}{step}{PARTIAL}"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        states = self.states | (self.shared_states if accelerator.is_main_process else {})
        content = {"step": step, "identity": self.identity}
        content |= {name: state.state_dict() for name, state in states.items()}
        torch.save(content, partial / _state_name(accelerator.process_index))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            remove(final)
            partial.rename(final)
            self._prune()
        accelerator.wait_for_everyone()
        return final

    def load(self, checkpoint: Path) -> int:
        """Restore a checkpoint. Every process has to call this.

        Returns:
            The number of updates that were made.

        Raises:
            ValueError: If it is not a checkpoint, or one of a run with other settings (the message names them).
        """
        accelerator = self.accelerator
        path = checkpoint / _state_name(accelerator.process_index)
        if not path.is_file():
            raise ValueError(
                f"'{checkpoint}' has no {path.name}: it is no checkpoint of this script, or one of fewer processes "
                f"than {accelerator.num_processes}"
            )
        content = _read(path)
        differing = [
            f"{name} is {content['identity'].get(name)} there and {value} here"
            for name, value in self.identity.items()
            if content["identity"].get(name) != value
        ]
        if differing:
            raise ValueError(f"'{checkpoint}' is of another run: {'; '.join(differing)}")
        accelerator.load_state(str(checkpoint))
        shared = content
        if self.shared_states and not accelerator.is_main_process:
            shared = _read(checkpoint / _state_name(0))
        for states, saved in ((self.states, content), (self.shared_states, shared)):
            for name, state in states.items():
                if name not in saved:
                    raise ValueError(f"'{checkpoint}' has no state '{name}': it is of another run")
                state.load_state_dict(saved[name])
        accelerator.wait_for_everyone()
        return content["step"]

    def _prune(self) -> None:
        if self.total_limit is not None:
            for path in find_checkpoints(self.folder)[: -self.total_limit]:
                remove(path)


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def remove_partial(folder: Path) -> None:
    """Remove what a killed run left half-written: checkpoints, its log, its result."""
    remove_unfinished(folder)
    for path in folder.glob(f"{PREFIX}*{PARTIAL}"):
        shutil.rmtree(path)


def resolve_checkpoint(folder: Path, requested: str | None) -> Path | None:
    """
    Find the checkpoint to resume from.

    Args:
        folder: The output folder of the run.
        requested: The checkpoint's folder, its name in `folder`, "latest", or None.

    Returns:
        The checkpoint's folder; None if none is requested, or if "latest" is and there is none yet.

    Raises:
        ValueError: If there is no such checkpoint; the message names those that exist.
    """
    if requested is None:
        return None
    existing = find_checkpoints(folder)
    if requested == "latest":
        return existing[-1] if existing else None
    for path in (Path(requested), folder / requested):
        if path.is_dir():
            return path
    names = ", ".join(path.name for path in existing) or "none"
    raise ValueError(f"There is no checkpoint '{requested}'; '{folder}' has: {names}")


def remove(path: Path) -> None:
    """Delete a checkpoint, so that an interrupted deletion leaves nothing that looks like a complete one."""
    if path.exists():
        doomed = path.with_name(f"{path.name}.removed{PARTIAL}")  # not the name that `save` writes to
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"'{path}' is damaged, {path.stat().st_size} bytes: resume from another one") from error


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that FSDP has sharded; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _state_name(process: int) -> str:
    return f"training_state_{process}.pt"
