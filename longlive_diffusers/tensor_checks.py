"""Whether a tensor that a caller gives holds numbers as every operator reads them."""

import torch

from .wording import counted


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError unless a tensor is there (the meta device has shapes only) and stored number by number. Its
    memory is not read: on a GPU, this waits for nothing."""
    kind = None
    if tensor.device.type == "meta":
        kind = "one on the meta device, which has no values"
    elif tensor.is_nested:
        kind = "a nested one"
    elif tensor.is_quantized:
        kind = f"a quantized one ({tensor.dtype})"
    elif tensor.layout != torch.strided:
        kind = f"a sparse one ({tensor.layout})"
    if kind is not None:
        raise ValueError(f"{name} must be a plain, dense tensor, got {kind}.")


def check_floats(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError unless a tensor is plain (see [`check_plain`]) and holds floats of 16, 32 or 64 bits."""
    check_plain(name, tensor)
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must hold floats of 16, 32 or 64 bits, got {tensor.dtype}.")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError for infinities and NaN. On a GPU, this waits for the device."""
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} has {counted(count, 'value')} that {'is' if count == 1 else 'are'} not finite.")
