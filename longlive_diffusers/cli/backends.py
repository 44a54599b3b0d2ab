"""Whether the backends that a user names exist, and can run here."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

from ..nvfp4.backends import BACKENDS, LayerShape


RUN_ON_CPU = (
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_FLASH,
    AttentionBackendName._NATIVE_MATH,
    AttentionBackendName.FLEX,
)


def check_attention_backend(name: str, device: torch.device) -> None:
    """
    Check an attention backend of diffusers, before anything is loaded.

    Raises:
        ValueError: If there is none of that name, the package that it needs is not installed, or it needs a GPU.
    """
    names = sorted(backend.value for backend in AttentionBackendName)
    if name.lower() not in names:
        raise ValueError(f"no attention backend '{name}': there are {', '.join(names)}")
    backend = AttentionBackendName(name.lower())
    try:
        _check_attention_backend_requirements(backend)
    except RuntimeError as error:
        raise ValueError(f"--attention-backend {name} cannot be used: {error}") from error
    if device.type == "cpu" and backend not in RUN_ON_CPU:
        names = ", ".join(backend.value for backend in RUN_ON_CPU)
        raise ValueError(f"--attention-backend {name} needs a GPU; on a CPU, there are {names}")


def check_nvfp4_backend(name: str, transformer: Mapping[str, Any], device: torch.device) -> None:
    """
    Check how products with weights in 4 bits are to be computed.

    Args:
        name: "auto", or the name of a backend.
        transformer: The configuration of the transformer.
        device: The device that it is to run on.

    Raises:
        ValueError: If the backend cannot run the transformer's layers on the device.
    """
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layer = LayerShape(width, width, "mse", "mse")
    reason = None if name == "auto" else BACKENDS[name].unsupported_reason(layer, device)
    if reason is not None:
        raise ValueError(f"--nvfp4 {name} {reason}")
