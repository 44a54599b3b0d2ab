"""`NVFP4Linear`: a linear layer whose weight is stored in 4 bits."""

import warnings

import torch
from torch import nn

from ..fp8.rows import FP8Rows
from .backends import (
    FP8Product,
    LayerShape,
    LinearBackend,
    ShareAmax,
    check_backend_name,
    choose_backend,
)
from .format import BLOCK, NVFP4Tensor, Weights, check_buffers, quantize
from .kept_dtypes import keeping_dtypes
from .matmul import connected_to
from .rules import scale_rule_named


STORED = ("weight_codes", "weight_scales", "weight_amax")


class NVFP4Linear(nn.Linear):
    """
    `y = x W^T + b` with W in NVFP4, frozen. Gradients flow to `x` as through the dequantized W, so a LoRA on top of
    the layer can be trained.

    The buffers `weight_codes`, `weight_scales` and `weight_amax` stand for the weight, and keep their dtypes under any
    `.to(dtype)`. The backend (`backends.py`) decides how the product is computed. It is selected for the weight's
    device when the layer is created and whenever it is moved, and is named in the layer's `repr`. Offloading moves
    weights without telling the layer, which therefore looks where its weight is in every forward.

    Args:
        in_features, out_features: As in `nn.Linear`; the first is a multiple of 16.
        bias: Whether the layer has a bias, which is never quantized.
        weight_scale_rule: The scale rule of the weight, by which `weight_amax` and the scales are read.
        activation_scale_rule: The rule by which `x` is quantized, where the backend does that.
        weight_block: The blocks in which a new weight is quantized: `(1, 16)`, or `(16, 16)` as in training.
        backend: "auto", "scaled_mm", "te", "fp8", "w4a16" or "emulate". A backend that cannot run on a device is
            replaced, with a warning, by the one that "auto" would choose there.
        device: The device of the buffers and the bias.
        dtype: The dtype of the bias.

    Raises:
        ValueError: If the sizes do not divide into blocks, or a name is unknown.
    """

    weight_codes: torch.Tensor
    weight_scales: torch.Tensor
    weight_amax: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_scale_rule: str = "mse",
        activation_scale_rule: str = "mse",
        weight_block: tuple[int, int] = (1, BLOCK),
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear's own `__init__` would allocate the weight
        if in_features % BLOCK:
            raise ValueError(f"NVFP4 needs inputs in multiples of {BLOCK}, this layer has {in_features}.")
        for rule in (weight_scale_rule, activation_scale_rule):
            scale_rule_named(rule)
        check_backend_name(backend)
        self.in_features, self.out_features = in_features, out_features
        self.weight_scale_rule, self.activation_scale_rule = weight_scale_rule, activation_scale_rule
        (rows, columns), self.requested_backend = weight_block, backend
        self.weight_block = (rows, columns)
        blocks = in_features // BLOCK
        codes = torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(out_features, blocks, dtype=torch.float8_e4m3fn, device=device)
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scales", scales)
        self.register_buffer("weight_amax", torch.zeros(1, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.share_amax: ShareAmax | None = None  # set where several ranks share the rows of an input
        self.select_backend()

    @classmethod
    def empty_like(cls, linear: nn.Linear, **options) -> "NVFP4Linear":
        """Create a layer of the same sizes, on the meta device, to be filled with a stored weight. It shares the bias
        of `linear` rather than copying it. `options` are arguments of the class."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **options, device="meta")
        layer.bias = linear.bias
        return layer.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> "NVFP4Linear":
        """Quantize a layer: like `empty_like`, but with the weight of `linear`."""
        layer = cls.empty_like(linear, **options)
        layer.store(quantize(linear.weight.detach(), layer.weight_scale_rule, layer.weight_block))
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """The packed codes, for PEFT, accelerate and others that ask a layer where its weight is."""
        return self.weight_codes

    @property
    def weight_nvfp4(self) -> NVFP4Tensor:
        """The stored weight, `[out_features, in_features]`."""
        return NVFP4Tensor(
            self.weight_codes, self.weight_scales, self.weight_amax, self.weight_scale_rule, self.weight_block
        )

    def store(self, weight: NVFP4Tensor) -> None:
        """Replace the weight.

        Raises:
            ValueError: If the shape or the scale rule of `weight` is not this layer's.
        """
        if weight.shape != (self.out_features, self.in_features) or weight.scale_rule != self.weight_scale_rule:
            raise ValueError(
                f"This layer holds {self.out_features} x {self.in_features} by '{self.weight_scale_rule}', got "
                f"{tuple(weight.shape)} by '{weight.scale_rule}'."
            )
        self.weight_codes, self.weight_scales, self.weight_amax = weight.codes, weight.scales, weight.amax
        self.select_backend()

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Return the dequantized weight, `[out_features, in_features]`."""
        return self.weight_nvfp4.dequantize(dtype)

    def set_backend(self, backend: str) -> None:
        """Change how the product is computed (see the class).

        Raises:
            ValueError: If there is no such backend.
        """
        check_backend_name(backend)
        self.requested_backend = backend
        self.select_backend()

    def select_backend(self) -> None:
        """Select the backend for the weight's current device, and precompute what it needs. On the meta device, there
        is no backend."""
        self.backend: LinearBackend | None = None
        # Inside a tuple, the product is not a submodule, so that offloading neither moves nor drops its buffers.
        self.product_on: tuple[torch.device, nn.Module] | None = None
        device = self.weight_codes.device
        if device.type == "meta":
            return
        check_buffers(self.weight_codes, self.weight_scales, self.weight_amax)
        shape = LayerShape(self.in_features, self.out_features, self.weight_scale_rule, self.activation_scale_rule)
        self.backend, unmet = choose_backend(self.requested_backend, shape, device)
        if unmet is not None:
            # Python shows identical warnings only once, so the hundreds of layers of a model warn once.
            warnings.warn(f"NVFP4: {unmet}; '{self.backend.name}' is used instead.", stacklevel=2)
        self.product_on = (device, self.backend.prepare(self.weight_nvfp4, self.activation_scale_rule))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of `x`; the bias is added after rounding, but by
        the backend `fp8` in bfloat16, whose product adds it before."""
        if self.takes_fp8(x):
            return self.multiply_fp8(FP8Rows.of(x))
        rows = x.reshape(-1, self.in_features)
        if not len(rows):
            product = rows.new_zeros(0, self.out_features)
        elif torch.is_grad_enabled() and x.requires_grad:
            product = _Product.apply(rows, self)
        else:
            product = self.multiply(rows)
        product = product.reshape(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """`[rows, in_features]` -> `[rows, out_features]`, without bias, by the layer's backend."""
        return self.product()(rows, self.weight_nvfp4, self.share_amax)

    def product(self) -> nn.Module:
        """Return the backend's product for the device that the weight is on."""
        if self.product_on is None or self.product_on[0] != self.weight_codes.device:
            self._select_backend_uncompiled()
        if self.product_on is None:
            raise RuntimeError("This NVFP4Linear has no weight yet: it is on the meta device.")
        return self.product_on[1]

    def takes_fp8(self, x: torch.Tensor) -> bool:
        """Whether [`multiply_fp8`] can compute the product with `x`, in bfloat16 and without gradients."""
        is_bf16 = x.dtype == torch.bfloat16 and x.numel() > 0 and not torch.is_grad_enabled()
        return is_bf16 and isinstance(self.product(), FP8Product)

    def multiply_fp8(self, x: FP8Rows) -> torch.Tensor:
        """Multiply an input that is quantized already, and add the bias: bfloat16 `[..., out_features]`."""
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        product = self.product()
        assert isinstance(product, FP8Product)  # see `takes_fp8`
        rows = product.multiply(x.codes, x.scale, self.weight_nvfp4, bias)
        return rows.reshape(*x.shape[:-1], self.out_features)

    @torch.compiler.disable()
    def _select_backend_uncompiled(self) -> None:
        """Select the backend in a forward, which happens only where weights are offloaded: what moves them is not
        compiled either."""
        self.select_backend()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # one line: the backend's name says which product it is

    def extra_repr(self) -> str:
        name = "not selected yet" if self.backend is None else self.backend.name
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.weight_scale_rule}, activation={self.activation_scale_rule}, backend={name}"
        )

    def _apply(self, fn, recurse: bool = True):
        self.product_on = None  # made again on the weight's new device
        with keeping_dtypes(self, STORED):
            super()._apply(fn, recurse)
        self.select_backend()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        amax = state_dict.get(f"{prefix}weight_amax")
        if amax is not None and amax.ndim == 0:
            state_dict[f"{prefix}weight_amax"] = amax.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.select_backend()


class _Product(torch.autograd.Function):
    """The product's gradient to `x` is that of the dequantized weight: rounding is treated as the identity."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, linear: NVFP4Linear) -> torch.Tensor:
        ctx.linear = linear
        return connected_to(x, linear.multiply(x))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ ctx.linear.dequantize(gradient.dtype), None


def weights_of(model: nn.Module) -> Weights:
    """Return a model's state dict in which each layer in NVFP4 has a single `weight` again, as `NVFP4Tensor`."""
    weights: Weights = dict(model.state_dict())
    for name, layer in nvfp4_layers(model).items():
        for part in STORED:
            del weights[f"{name}.{part}"]
        weights[f"{name}.weight"] = layer.weight_nvfp4
    return weights


def nvfp4_layers(model: nn.Module) -> dict[str, NVFP4Linear]:
    """Return the layers of a model that are stored in NVFP4, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NVFP4Linear)}
