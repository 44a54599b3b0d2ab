"""Checkpoints of a run: written completely or not at all, found again, and pruned.

A checkpoint is written under another name, and renamed when every process has written its part and all of it is on the
disk; what a killed run left half-written is removed at the next start. Besides what accelerate saves (weights,
optimizers, random states) it holds the step and any number of named states: averaged weights, error buffers. The order
of samples, their noise and the learning rate need no saving: they are functions of the settings and the step.
"""

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from longlive_diffusers.user_path import user_path
from run.agreement import on_main_process
from run.log import LOG_FILE, read_log
from run.seal import damages, sync, sync_files, write_seal


PREFIX = "checkpoint-"
PARTIAL = ".partial"
RESULTS = ("model_index.json", "pytorch_lora_weights.safetensors")
BESIDE_RESULTS = ("README.md", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")

logger = logging.getLogger("checkpoints")


class Stateful(Protocol):
    """Anything whose state can be saved and loaded: buffers, averages, schedules."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


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
        """
        Write `checkpoint-<step>`, after `step` updates. Every process has to call this.

        Raises:
            OSError: If it cannot be written; nothing of it stays.
        """
        accelerator = self.accelerator
        final = self.folder / f"{PREFIX}{step}"
        partial = self.folder / f"{PREFIX}{step}{PARTIAL}"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            self._write(partial, step)
            sums = gather_object(list(sync_files(partial, **_ranks(accelerator)).items()))
        except (OSError, RuntimeError, SafetensorError) as error:  # what each library says about a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"'{final}' could not be written: {error}") from error
        if accelerator.is_main_process:
            write_seal(partial, dict(sums))
            replaced = _set_aside(final)
            partial.rename(final)
            sync(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune(step)
        accelerator.wait_for_everyone()
        return final

    def _write(self, partial: Path, step: int) -> None:
        accelerator = self.accelerator
        accelerator.save_state(str(partial))
        states = self.states | (self.shared_states if accelerator.is_main_process else {})
        content = {"step": step, "identity": self.identity}
        content |= {name: state.state_dict() for name, state in states.items()}
        torch.save(content, partial / _state_name(accelerator.process_index))
        accelerator.wait_for_everyone()

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
        try:
            accelerator.load_state(str(checkpoint))
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"'{checkpoint}' does not fit this network: {error}") from error
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

    def _prune(self, step: int) -> None:
        """Remove the oldest checkpoints, up to that of `step`: later ones, which are damaged, do not count."""
        if self.total_limit is not None:
            own = [path for path in find_checkpoints(self.folder) if _step(path) <= step]
            for path in own[: -self.total_limit]:
                try:
                    shutil.rmtree(_set_aside(path), ignore_errors=True)
                except OSError as error:  # the new checkpoint is there: no reason to end the run
                    logger.warning("the old checkpoint '%s' could not be removed: %s", path, error)


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    pattern = re.compile(rf"{PREFIX}[0-9]+")
    return sorted((path for path in folder.glob(f"{PREFIX}*") if pattern.fullmatch(path.name)), key=_step)


def remove_partial(folder: Path) -> None:
    """Remove checkpoints that a killed run left half-written, or half-removed."""
    for path in folder.glob(f"{PREFIX}*{PARTIAL}"):
        shutil.rmtree(path)


def resolve_checkpoint(accelerator: Accelerator, folder: Path, requested: str | None) -> Path | None:
    """
    Find the checkpoint to resume from, and check that all of it is there. Every process has to call this.

    "latest" passes over damaged checkpoints, with a warning that names them. A folder holds the checkpoints and the
    result of one run, which nothing but this run's own continuation may replace.

    Args:
        accelerator: The accelerator of the run, whose processes share the reading.
        folder: The output folder of the run.
        requested: The checkpoint's folder, its name in `folder`, "latest", or None.

    Returns:
        The checkpoint's folder; None if none is requested, or if "latest" is and there is none yet.

    Raises:
        ValueError: If there is no such checkpoint, or it is damaged; the message says what is there. Or if the run
            would overwrite what another run has left in its folder.
    """
    wanted = on_main_process(accelerator, lambda: _candidates(folder, requested))
    reasons: list[str] = []
    for path in wanted:
        # As long as the seal itself is damaged, every process says so.
        damaged = list(dict.fromkeys(gather_object(damages(path, **_ranks(accelerator)))))
        if not damaged:
            on_main_process(accelerator, lambda path=path: _check_continues(folder, path, passed_over=len(reasons)))
            return path
        if requested != "latest":
            raise ValueError(f"{'; '.join(damaged)}: resume from another checkpoint")
        reasons.append("; ".join(damaged))
        if accelerator.is_main_process:
            logger.warning("'%s' is passed over: %s", path, reasons[-1])
    if reasons:
        raise ValueError(
            f"No checkpoint in '{folder}' can be resumed from ({'; '.join(reasons)}); to begin anew, remove them or "
            "choose another --output_dir"
        )
    on_main_process(accelerator, lambda: _check_is_new(folder))
    return None


def check_steps(checkpoint: Path, step: int, max_train_steps: int, folder: Path) -> None:
    """
    Check that a run which resumes makes more of it than there is.

    Args:
        checkpoint: Where it resumes.
        step: The number of its updates.
        max_train_steps: The number of updates that there are to be.
        folder: The output folder, whose result the run's own will replace.

    Raises:
        ValueError: If the checkpoint has more updates, or the result has.
    """
    if step > max_train_steps:
        raise ValueError(f"'{checkpoint}' has {step} updates, more than --max_train_steps {max_train_steps}")
    last = max((int(entry["step"]) for entry in read_log(folder / LOG_FILE)), default=0)
    if _results(folder) and last > max_train_steps:
        raise ValueError(
            f"--output_dir '{folder}' has {', '.join(_results(folder))} of {last} updates, which those of "
            f"--max_train_steps {max_train_steps} would replace: choose another folder, or remove them"
        )


def saved_in(folder: Path, resumed: Path | None, step: int) -> int:
    """Return the update of the newest checkpoint that a run has in its own folder when it begins, 0 if it has none.

    Args:
        folder: The output folder of the run.
        resumed: The checkpoint that it resumes from, in this or another folder, or None.
        step: The number of updates there.
    """
    return step if resumed is not None and resumed.resolve().parent == folder.resolve() else 0


def _results(folder: Path) -> list[str]:
    return [name for name in RESULTS if (folder / name).exists()]


def _candidates(folder: Path, requested: str | None) -> list[Path]:
    """Return the checkpoints to try, in order."""
    if requested is None:
        return []
    existing = find_checkpoints(folder)
    if requested == "latest":
        return existing[::-1]
    for path in (user_path(requested), folder / requested):
        if path.is_dir():
            return [path]
    names = ", ".join(path.name for path in existing) or "none"
    raise ValueError(f"There is no checkpoint '{requested}'; '{folder}' has: {names}")


def _check_is_new(folder: Path) -> None:
    """Raise a ValueError if a run that begins in this folder would replace what another has left there."""
    if checkpoints := [path.name for path in find_checkpoints(folder)]:
        raise ValueError(
            f"--output_dir '{folder}' has {', '.join(checkpoints)} of an earlier run: choose another folder, remove "
            "them, or go on from there with --resume_from_checkpoint"
        )
    if results := _results(folder):
        raise ValueError(
            f"--output_dir '{folder}' has {', '.join(results)} of an earlier run, and no checkpoint to go on from: "
            "choose another folder, or remove them"
        )
    if others := [name for name in BESIDE_RESULTS if (folder / name).exists()]:
        raise ValueError(
            f"--output_dir '{folder}' has {', '.join(others)}, which the result of this run may replace: choose "
            "another folder, or remove them"
        )


def _check_continues(folder: Path, checkpoint: Path, *, passed_over: int) -> None:
    """Raise a ValueError if a run that resumes would replace what is not its own: later checkpoints of this folder
    (but for damaged ones that were passed over), or anything if the checkpoint lies elsewhere."""
    if checkpoint.resolve().parent != folder.resolve():
        _check_is_new(folder)
        return
    later = [path.name for path in find_checkpoints(folder) if _step(path) > _step(checkpoint)]
    if len(later) > passed_over:
        raise ValueError(
            f"'{folder}' also has {', '.join(later)}, which come after '{checkpoint.name}': remove them, or resume in "
            "another --output_dir"
        )


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint, if it is there, so that an interrupted deletion leaves nothing that looks complete.

    Returns:
        Its new path, to be deleted.
    """
    doomed = path.with_name(f"{path.name}.removed{PARTIAL}")  # not the name that `save` writes to
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists():
        path.rename(doomed)
    return doomed


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if {"step", "identity"} <= content.keys():
            return content
    except (RuntimeError, UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged, {path.stat().st_size} bytes: resume from another one") from error
    raise ValueError(f"'{path}' is no state of this script")


def _ranks(accelerator: Accelerator) -> dict[str, int]:
    return {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _state_name(process: int) -> str:
    return f"training_state_{process}.pt"
