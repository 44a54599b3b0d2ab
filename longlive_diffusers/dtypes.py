"""The floating-point types of weights, keys and values, by the names that command lines and files call them."""

import torch


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """The name without `torch.` in front of it."""
    return str(dtype).removeprefix("torch.")
