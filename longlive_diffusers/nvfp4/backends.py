"""Ways to multiply by a weight that is stored in NVFP4.

All take the same stored tensors. `scaled_mm` and `te` multiply in 4 bits on Blackwell's tensor cores; `emulate` gives
their results anywhere, slowly; `fp8` multiplies in 8 bits on Hopper and Ada, which have no 4-bit products; `w4a16`
saves memory only: it makes a bfloat16 weight of the stored one for as long as the product takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .format import NVFP4Tensor, quantize_unchecked
from .matmul import emulate, multiply_in_hardware, why_not_in_hardware, why_too_old
from .rules import MAX_SCALE
from .swizzle import swizzle
from .te_backend import multiply_in_te, prepare_te, why_no_te


if TYPE_CHECKING:
    from .linear import NVFP4Linear


@dataclass(frozen=True)
class LinearBackend:
    """
    Args:
        name: By which configurations and `repr` call it.
        why_not: What keeps it from serving a layer on a device, as the end of a sentence; None: nothing does.
        multiply: `x` `[rows, in_features]` times the layer's weight, `[rows, out_features]` in the dtype of `x`,
            without the bias.
        prepare: What it wants to keep beside the stored weight, by name: the layer makes attributes of it, which are
            not saved.
    """

    name: str
    why_not: Callable[["NVFP4Linear", torch.device], str | None]
    multiply: Callable[["NVFP4Linear", torch.Tensor], torch.Tensor]
    prepare: Callable[["NVFP4Linear"], dict[str, Any]] = lambda linear: {}


def choose_backend(linear: "NVFP4Linear", wish: str, device: torch.device) -> tuple[LinearBackend, str | None]:
    """
    The backend for a wish: what was wished for, or else what suits the device best.

    Returns:
        The backend, and why the wish was not met (None where it was).

    Raises:
        ValueError: There is no backend of that name.
    """
    check_backend_name(wish)
    reason = None
    if wish != "auto":
        why_not = BACKENDS[wish].why_not(linear, device)
        if why_not is None:
            return BACKENDS[wish], None
        reason = f"'{wish}' {why_not}"
    suitable = ("scaled_mm", "fp8", "w4a16") if device.type == "cuda" else ("emulate",)
    return next(BACKENDS[name] for name in suitable if BACKENDS[name].why_not(linear, device) is None), reason


def check_backend_name(wish: str) -> None:
    """
    Raises:
        ValueError: There is no backend of that name.
    """
    if wish != "auto" and wish not in BACKENDS:
        raise ValueError(f"An NVFP4 backend is auto, {', '.join(BACKENDS)}; got {wish!r}.")


# ---------------------------------------------------------------------------------------------------------- emulate
def quantize_activation(linear: "NVFP4Linear", x: torch.Tensor) -> NVFP4Tensor:
    """`x` `[rows, in_features]` by the layer's rule for activations."""
    return quantize_unchecked(x, linear.activation_scale_rule)


def _emulate(linear: "NVFP4Linear", x: torch.Tensor) -> torch.Tensor:
    return emulate(quantize_activation(linear, x), linear.weight_nvfp4, x.dtype)


# ------------------------------------------------------------------------------------------------------------ w4a16
def _w4a16(linear: "NVFP4Linear", x: torch.Tensor) -> torch.Tensor:
    return x @ linear.dequantize(x.dtype).T


# -------------------------------------------------------------------------------------------------------------- fp8
def _why_no_fp8(linear: "NVFP4Linear", device: torch.device) -> str | None:
    if linear.in_features % 16 or linear.out_features % 16:
        return f"needs multiples of 16, this layer is {linear.in_features} -> {linear.out_features}"
    if device.type not in ("cuda", "cpu"):
        return f"does not run on '{device.type}'"
    return why_too_old(device, (8, 9)) if device.type == "cuda" else None


def _prepare_fp8(linear: "NVFP4Linear") -> dict[str, torch.Tensor]:
    weight, scale = rows_to_fp8(linear.dequantize(torch.float32))
    return {"fp8_weight": weight, "fp8_scale": scale}


def rows_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn `[rows, cols]`, and the scales that give `x` again, float32 `[rows, 1]`."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / MAX_SCALE
    return (x.float() / scale).clamp(-MAX_SCALE, MAX_SCALE).to(torch.float8_e4m3fn), scale


def _fp8(linear: "NVFP4Linear", x: torch.Tensor) -> torch.Tensor:
    codes, scale = rows_to_fp8(x)
    row_wise = F.ScalingType.RowWise
    product = F.scaled_mm(
        codes,
        linear.fp8_weight.t(),
        scale,
        row_wise,
        linear.fp8_scale.t(),
        row_wise,
        output_dtype=torch.bfloat16,
    )
    return product.to(x.dtype)


# -------------------------------------------------------------------------------------------------------- scaled_mm
def _why_no_scaled_mm(linear: "NVFP4Linear", device: torch.device) -> str | None:
    return why_not_in_hardware(device, linear.in_features, linear.out_features)


def _prepare_scaled_mm(linear: "NVFP4Linear") -> dict[str, torch.Tensor]:
    return {"swizzled_scales": swizzle(linear.weight_scales)}


def _scaled_mm(linear: "NVFP4Linear", x: torch.Tensor) -> torch.Tensor:
    product = multiply_in_hardware(quantize_activation(linear, x), linear.weight_nvfp4, linear.swizzled_scales)
    return product.to(x.dtype)


BACKENDS = {
    backend.name: backend
    for backend in (
        LinearBackend("scaled_mm", _why_no_scaled_mm, _scaled_mm, _prepare_scaled_mm),
        LinearBackend("te", why_no_te, multiply_in_te, prepare_te),
        LinearBackend("fp8", _why_no_fp8, _fp8, _prepare_fp8),
        LinearBackend("w4a16", lambda linear, device: None, _w4a16),
        LinearBackend("emulate", lambda linear, device: None, _emulate),
    )
}
