"""The decision whether Triton kernels compute something, and their launch."""

import functools
import importlib
import warnings
from types import ModuleType

import torch


def uses_kernels(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels compute what lies where `tensor` does; else, plain PyTorch does."""
    return is_for_kernels(tensor.device) and triton_loads()


def is_for_kernels(device: torch.device) -> bool:
    """Whether kernels are for this kind of device: for GPUs."""
    return device.type == "cuda"


@torch.compiler.assume_constant_result  # `torch.compile` calls it, as it cannot trace an import
def triton_loads() -> bool:
    """Whether Triton, and with it the kernels, can be imported."""
    return _load_triton() is not None


@functools.cache
def _load_triton() -> ModuleType | None:
    """Return Triton's language, or None (with a warning) if it cannot be imported. Tried once."""
    try:
        return importlib.import_module("triton.language")
    except Exception as error:  # a GPU library's import fails in many ways
        warnings.warn(
            f"Triton does not load ({type(error).__name__}: {error}); plain PyTorch takes the place of its kernels, "
            "slowly.",
            stacklevel=3,
        )
        return None


def launch_from(
    module: str, kernel: str, grid: tuple[int, ...], on: torch.Tensor, *arguments, fuses: bool = False, **constants
) -> None:
    """
    Run a kernel on the device of `on`. Triton by itself takes the current one, but a pipeline may be on another GPU.

    Args:
        module: The module of kernels, which is imported when the first of them is run.
        kernel: The name of a function under `triton.jit` in it.
        grid: The number of programs along each axis.
        on: A tensor on the device that the kernel runs on.
        *arguments, **constants: What the kernel takes.
        fuses: Whether a product and a sum may be rounded together. On doing so separately rests that NVFP4 is equal
            bit for bit on all devices.
    """
    kernels = importlib.import_module(module)
    with torch.cuda.device_of(on):
        getattr(kernels, kernel)[grid](*arguments, **constants, enable_fp_fusion=fuses)


def next_power_of_two(number: int) -> int:
    """The least power of two that is not less, as Triton wants the sizes of what a program holds."""
    return 1 << (number - 1).bit_length()


def warps_for(dim: int) -> int:
    """The number of warps of a program for a row of `dim` numbers: 16 numbers a thread, and more of long rows."""
    return min(16, max(1, next_power_of_two(dim) // 512))
