"""Whether Triton is there."""

import functools
import warnings
from types import ModuleType


@functools.cache
def load_kernels() -> ModuleType | None:
    """`kernels.py`, or None with a warning where Triton cannot be imported. Asked for on GPUs only, and tried once."""
    try:
        from . import kernels
    except Exception as error:  # a GPU library's import fails in many ways
        warnings.warn(
            f"NVFP4: Triton does not load ({type(error).__name__}: {error}); plain PyTorch quantises, slowly.",
            stacklevel=3,
        )
        return None
    return kernels
