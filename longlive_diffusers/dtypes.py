"""Floating-point types: those of weights, keys and values, by the names that command lines and files call them; and
where there is float64."""

import torch


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def float64_device(device: torch.device) -> torch.device:
    """Return where to compute in float64 what `device` needs: there, or on the CPU, because Metal has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def dtype_name(dtype: torch.dtype) -> str:
    """The name without `torch.` in front of it."""
    return str(dtype).removeprefix("torch.")
