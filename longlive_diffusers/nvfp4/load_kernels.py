"""The decision whether Triton kernels compute something, and their import, if there is a Triton that loads."""

import functools
import importlib
import warnings
from types import ModuleType

import torch


def uses_kernels(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels (`operators.py`) compute what lies where `tensor` does; else, plain PyTorch does."""
    return is_for_kernels(tensor.device) and kernels_load()


def is_for_kernels(device: torch.device) -> bool:
    """Whether kernels are for this kind of device: for GPUs."""
    return device.type == "cuda"


@torch.compiler.assume_constant_result  # `torch.compile` calls it, as it cannot trace an import
def kernels_load() -> bool:
    """Whether Triton, and with it the kernels, can be imported."""
    return load_kernels() is not None


@functools.cache
def load_kernels() -> ModuleType | None:
    """Return `kernels.py`, or None (with a warning) if Triton cannot be imported. Tried once."""
    try:
        return importlib.import_module(".kernels", __package__)
    except Exception as error:  # a GPU library's import fails in many ways
        warnings.warn(
            f"NVFP4: Triton does not load ({type(error).__name__}: {error}); plain PyTorch quantizes, slowly.",
            stacklevel=3,
        )
        return None
