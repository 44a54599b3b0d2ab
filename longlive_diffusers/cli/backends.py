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
# "auto" is "emulate" there.
EMULATED_ON_CPU = ("auto", "emulate", "fp8")


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


def check_nvfp4_backend(
    option: str,
    name: str,
    transformer: Mapping[str, Any],
    device: torch.device,
    weight_rule: str = "mse",
    activation_rule: str = "mse",
) -> None:
    """
    Check how products with weights in 4 bits are to be computed.

    Args:
        option: The option that asks for it.
        name: "auto", or the name of a backend.
        transformer: The configuration of the transformer.
        device: The device that it is to run on.
        weight_rule, activation_rule: The scale rules of its weights and their inputs.

    Raises:
        ValueError: If the backend cannot run the transformer's layers on the device.
    """
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layer = LayerShape(width, width, weight_rule, activation_rule)
    reason = None if name == "auto" else BACKENDS[name].unsupported_reason(layer, device)
    if reason is not None:
        raise ValueError(f"{option} {name} {reason}")


def notes_on_speed(device: torch.device, dtype: str, nvfp4: str | None) -> list[str]:
    """Return what a user should know about the speed of what was asked for, a line each."""
    notes = []
    if device.type == "cpu" and dtype == "float16":
        notes.append("--dtype float16 is slow on a CPU; float32 and bfloat16 are faster there")
    if device.type == "cpu" and nvfp4 in EMULATED_ON_CPU:
        notes.append(
            f"--nvfp4 {nvfp4} is emulated on a CPU: it computes what a GPU would, but slower than without --nvfp4; "
            "w4a16 is not"
        )
    return notes
