"""Ways to multiply by a weight that is stored in NVFP4.

All take the same stored tensors. `scaled_mm` and `te` multiply in 4 bits on Blackwell's tensor cores; `emulate` gives
their results anywhere, slowly. `w4a16` only saves memory: it dequantizes the stored weight to the dtype of the input
for the duration of the product. `fp8` multiplies in 8 bits where there are no 4-bit products, on Hopper and Ada. It
pays where products dominate, that is with many rows, and where memory does not matter: it keeps the weight in FP8 as
well, nearly three times the memory of `w4a16`, and rounds the inputs. "auto" never chooses it.

A backend creates a *product* for a layer: a small module, `product(x, weight, share_amax) -> x W^T`, that keeps what
it needs besides the stored weight (swizzled scales, a weight in FP8) in buffers that are not saved. A product is made
for the weight's device and never moved: where the weight is moved, another is made.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..fp8.rows import rows_to_fp8
from .format import NVFP4Tensor, quantize_unchecked
from .matmul import (
    capability_unsupported_reason,
    emulate,
    fp8_matmul,
    hardware_unsupported_reason,
    multiply_in_hardware,
    swizzle,
)
from .transformer_engine import TEProduct, te_unsupported_reason


ShareAmax = Callable[[torch.Tensor], torch.Tensor]
"""Returns the largest absolute number over the ranks that have other rows of the same input, given this rank's."""


@dataclass(frozen=True)
class LayerShape:
    """What a backend needs to know about a layer to decide whether it can run it.

    Args:
        in_features, out_features: The sizes of the layer, as in `nn.Linear`.
        weight_scale_rule, activation_scale_rule: The scale rules by which its weight and its inputs are quantized.
    """

    in_features: int
    out_features: int
    weight_scale_rule: str
    activation_scale_rule: str


@dataclass(frozen=True)
class LinearBackend:
    """One way to multiply inputs by a stored weight.

    Args:
        name: The name of the backend in configurations and in `repr`.
        unsupported_reason: Returns why the backend cannot run a layer on a device, as the end of a sentence, or None
            if it can.
        prepare: Creates the product for a stored weight and the scale rule of its inputs.
    """

    name: str
    unsupported_reason: Callable[[LayerShape, torch.device], str | None]
    prepare: Callable[[NVFP4Tensor, str], nn.Module]


def choose_backend(requested: str, layer: LayerShape, device: torch.device) -> tuple[LinearBackend, str | None]:
    """
    Return the requested backend or, if it cannot run, the one that suits the device best.

    Returns:
        The backend, and why the request could not be met (None if it was met).

    Raises:
        ValueError: If there is no backend of that name.
    """
    check_backend_name(requested)
    reason = None
    if requested != "auto":
        unsupported = BACKENDS[requested].unsupported_reason(layer, device)
        if unsupported is None:
            return BACKENDS[requested], None
        reason = f"'{requested}' {unsupported}"
    suitable = ("scaled_mm", "w4a16") if device.type == "cuda" else ("emulate",)
    candidates = (BACKENDS[name] for name in suitable)
    return next(backend for backend in candidates if backend.unsupported_reason(layer, device) is None), reason


def check_backend_name(name: str) -> None:
    """Check that there is a backend of that name, or that it is "auto".

    Raises:
        ValueError: If there is no backend of that name.
    """
    if not isinstance(name, str) or name not in ("auto", *BACKENDS):
        raise ValueError(f"An NVFP4 backend is auto, {', '.join(BACKENDS)}; got {name!r}.")


class EmulatedProduct(nn.Module):
    """A product of 4-bit inputs and the 4-bit weight, computed as tensor cores would, on any device."""

    def __init__(self, weight: NVFP4Tensor, activation_rule: str):
        super().__init__()
        self.activation_rule = activation_rule

    def forward(self, x: torch.Tensor, weight: NVFP4Tensor, share_amax: ShareAmax | None = None) -> torch.Tensor:
        """`[rows, in_features]` -> `[rows, out_features]`."""
        return emulate(quantize_rows_of(x, self.activation_rule, share_amax), weight, x.dtype)


class W4A16Product(nn.Module):
    """A plain product with the dequantized weight."""

    def __init__(self, weight: NVFP4Tensor, activation_rule: str):
        super().__init__()

    def forward(self, x: torch.Tensor, weight: NVFP4Tensor, share_amax: ShareAmax | None = None) -> torch.Tensor:
        """`[rows, in_features]` -> `[rows, out_features]`."""
        return x @ weight.dequantize(x.dtype).T


class FP8Product(nn.Module):
    """A product in 8 bits, with one scale for each row of either factor. On a CPU, where offloaded weights wait,
    nothing is kept: the weight is quantized in each product."""

    codes: torch.Tensor | None
    scale: torch.Tensor | None

    def __init__(self, weight: NVFP4Tensor, activation_rule: str):
        super().__init__()
        codes, scale = self._in_fp8(weight) if weight.codes.is_cuda else (None, None)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: torch.Tensor, weight: NVFP4Tensor, share_amax: ShareAmax | None = None) -> torch.Tensor:
        """`[rows, in_features]` -> `[rows, out_features]`."""
        return self.multiply(*rows_to_fp8(x), weight).to(x.dtype)

    def multiply(
        self, codes: torch.Tensor, scale: torch.Tensor, weight: NVFP4Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply rows that are quantized already, by `rows_to_fp8`, and add the bias: bfloat16
        `[rows, out_features]`."""
        weight_codes, weight_scale = self.codes, self.scale
        if weight_codes is None or weight_scale is None:
            weight_codes, weight_scale = self._in_fp8(weight)
        return fp8_matmul(codes, scale, weight_codes, weight_scale, bias)

    @staticmethod
    def _in_fp8(weight: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rows_to_fp8(weight.dequantize(torch.float32))


class ScaledMMProduct(nn.Module):
    """A product in 4 bits, computed by torch's own operator."""

    swizzled_scales: torch.Tensor

    def __init__(self, weight: NVFP4Tensor, activation_rule: str):
        super().__init__()
        self.activation_rule = activation_rule
        self.register_buffer("swizzled_scales", swizzle(weight.scales), persistent=False)

    def forward(self, x: torch.Tensor, weight: NVFP4Tensor, share_amax: ShareAmax | None = None) -> torch.Tensor:
        """`[rows, in_features]` -> `[rows, out_features]`."""
        x_rounded = quantize_rows_of(x, self.activation_rule, share_amax)
        return multiply_in_hardware(x_rounded, weight, self.swizzled_scales).to(x.dtype)


def quantize_rows_of(x: torch.Tensor, scale_rule: str, share_amax: ShareAmax | None) -> NVFP4Tensor:
    """Quantize this rank's rows of an input; the global scale is that of all of them, as on one device."""
    if share_amax is None:
        return quantize_unchecked(x, scale_rule)
    return quantize_unchecked(x, scale_rule, amax=share_amax(x.abs().amax().float().reshape(1)))


def _fp8_unsupported_reason(layer: LayerShape, device: torch.device) -> str | None:
    if layer.in_features % 16 or layer.out_features % 16:
        return f"needs multiples of 16, this layer is {layer.in_features} -> {layer.out_features}"
    if device.type not in ("cuda", "cpu"):
        return f"does not run on '{device.type}'"
    return capability_unsupported_reason(device, (8, 9)) if device.type == "cuda" else None


def _scaled_mm_unsupported_reason(layer: LayerShape, device: torch.device) -> str | None:
    return hardware_unsupported_reason(device, layer.in_features, layer.out_features)


def _te_unsupported_reason(layer: LayerShape, device: torch.device) -> str | None:
    return te_unsupported_reason({layer.weight_scale_rule, layer.activation_scale_rule}, device)


def _runs_anywhere(layer: LayerShape, device: torch.device) -> None:
    return None


BACKENDS = {
    backend.name: backend
    for backend in (
        LinearBackend("scaled_mm", _scaled_mm_unsupported_reason, ScaledMMProduct),
        LinearBackend("te", _te_unsupported_reason, TEProduct),
        LinearBackend("fp8", _fp8_unsupported_reason, FP8Product),
        LinearBackend("w4a16", _runs_anywhere, W4A16Product),
        LinearBackend("emulate", _runs_anywhere, EmulatedProduct),
    )
}
