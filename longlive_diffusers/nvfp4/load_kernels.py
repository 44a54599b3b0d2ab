"""Import the Triton kernels, if there is a Triton that loads."""

import functools
import importlib
import warnings
from types import ModuleType


@functools.cache
def load_kernels() -> ModuleType | None:
    """Return `kernels.py`, or None (with a warning) if Triton cannot be imported. Called for GPUs only; tried once."""
    try:
        return importlib.import_module(".kernels", __package__)
    except Exception as error:  # a GPU library's import fails in many ways
        warnings.warn(
            f"NVFP4: Triton does not load ({type(error).__name__}: {error}); plain PyTorch quantizes, slowly.",
            stacklevel=3,
        )
        return None
