"""`NVFP4Linear`: a linear layer whose weight is stored in 4 bits."""

import warnings

import torch
from torch import nn

from .backends import LayerShape, LinearBackend, check_backend_name, choose_backend
from .format import BLOCK, NVFP4Tensor, check_buffers, quantize
from .rules import scale_rule_named


STORED = ("weight_codes", "weight_scales", "weight_amax")


class NVFP4Linear(nn.Linear):
    """
    `y = x W^T + b` with W in NVFP4, frozen; gradients flow to `x` as through the dequantized W, so LoRA trains on it.

    The buffers `weight_codes`, `weight_scales` and `weight_amax` stand for the weight, and keep their dtypes whatever
    `.to(dtype)` is called. How the product is computed is the backend (`backends.py`), selected for the device when
    the layer is made and when it is moved, and named in its `repr`; `product` is what it made for this layer.

    Args:
        in_features, out_features: As in `nn.Linear`; the first is a multiple of 16.
        bias: Whether there is one; it is never quantized.
        weight_scale_rule: How `weight_amax` and the scales are to be read.
        weight_block: `(1, 16)`, or `(16, 16)` as in training: how a new weight is quantized.
        activation_scale_rule: The rule by which `x` is quantized, where the backend does that.
        backend: "auto", "scaled_mm", "te", "fp8", "w4a16" or "emulate". One that cannot run on a device gives way,
            with a warning, to what "auto" would take there.
        device: Where the buffers and the bias are.
        dtype: The dtype of the bias.

    Raises:
        ValueError: For sizes that do not divide into blocks, or unknown names.
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
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight
        if in_features % BLOCK:
            raise ValueError(f"NVFP4 needs inputs in multiples of {BLOCK}, this layer has {in_features}.")
        for rule in (weight_scale_rule, activation_scale_rule):
            scale_rule_named(rule)
        check_backend_name(backend)
        self.in_features, self.out_features = in_features, out_features
        self.weight_scale_rule, self.activation_scale_rule = weight_scale_rule, activation_scale_rule
        self.weight_block, self.requested_backend = tuple(weight_block), backend
        blocks = in_features // BLOCK
        codes = torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(out_features, blocks, dtype=torch.float8_e4m3fn, device=device)
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scales", scales)
        self.register_buffer("weight_amax", torch.zeros(1, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.select_backend()

    @classmethod
    def empty_like(cls, linear: nn.Linear, **options) -> "NVFP4Linear":
        """A layer of the same sizes, on the meta device, for a stored weight to be put into; with the same bias, not a
        copy of it. Options as of the class."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **options, device="meta")
        layer.bias = linear.bias
        return layer.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> "NVFP4Linear":
        """Quantize a layer; as `empty_like`, with its weight."""
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
        """Take another weight.

        Raises:
            ValueError: Its shape or its rule is not this layer's.
        """
        if weight.shape != (self.out_features, self.in_features) or weight.scale_rule != self.weight_scale_rule:
            raise ValueError(
                f"This layer holds {self.out_features} x {self.in_features} by '{self.weight_scale_rule}', got "
                f"{tuple(weight.shape)} by '{weight.scale_rule}'."
            )
        self.weight_codes, self.weight_scales, self.weight_amax = weight.codes, weight.scales, weight.amax
        self.select_backend()

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The weight, `[out_features, in_features]`."""
        return self.weight_nvfp4.dequantize(dtype)

    def set_backend(self, backend: str) -> None:
        """Compute in another way, see the class.

        Raises:
            ValueError: If there is no such backend.
        """
        check_backend_name(backend)
        self.requested_backend = backend
        self.select_backend()

    def select_backend(self) -> None:
        """Select the backend for the weight's current device, and precompute what it needs; nothing on the meta
        device."""
        self.backend: LinearBackend | None = None
        self.product: nn.Module | None = None
        device = self.weight_codes.device
        if device.type == "meta":
            return
        check_buffers(self.weight_codes, self.weight_scales, self.weight_amax)
        shape = LayerShape(self.in_features, self.out_features, self.weight_scale_rule, self.activation_scale_rule)
        self.backend, unmet = choose_backend(self.requested_backend, shape, device)
        if unmet is not None:
            # Python shows a warning of the same words once, and a model has hundreds of such layers.
            warnings.warn(f"NVFP4: {unmet}; '{self.backend.name}' is used instead.", stacklevel=2)
        self.product = self.backend.prepare(self.weight_nvfp4, self.activation_scale_rule)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of `x`; the bias is added after rounding."""
        rows = x.reshape(-1, self.in_features)
        if not len(rows):
            product = rows.new_zeros(0, self.out_features)
        elif torch.is_grad_enabled() and x.requires_grad:
            product = _Product.apply(rows, self)
        else:
            product = self.product(rows, self.weight_nvfp4)
        product = product.reshape(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # one line; the product is told by the backend's name

    def extra_repr(self) -> str:
        name = "not selected yet" if self.backend is None else self.backend.name
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.weight_scale_rule}, activation={self.activation_scale_rule}, backend={name}"
        )

    def _apply(self, fn, recurse: bool = True):
        stored = {name: self.get_buffer(name) for name in STORED}
        self.product = None  # made anew for where the weight will be
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:  # `.to(dtype)` means the model's precision, not this format's
                self._buffers[name] = before.to(after.device)
        self.select_backend()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        amax = state_dict.get(f"{prefix}weight_amax")
        if amax is not None and amax.ndim == 0:
            state_dict[f"{prefix}weight_amax"] = amax.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.select_backend()


class _Product(torch.autograd.Function):
    """The product's gradient to `x` is that of the dequantized weight: rounding is taken for the identity."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, linear: NVFP4Linear) -> torch.Tensor:
        ctx.linear = linear
        return linear.product(x, linear.weight_nvfp4)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ ctx.linear.dequantize(gradient.dtype), None


def weights_of(model: nn.Module) -> dict[str, torch.Tensor | NVFP4Tensor]:
    """A model's state dict in which a layer in NVFP4 has a `weight` again, as `NVFP4Tensor`."""
    weights = dict(model.state_dict())
    for name, layer in nvfp4_layers(model).items():
        for part in STORED:
            del weights[f"{name}.{part}"]
        weights[f"{name}.weight"] = layer.weight_nvfp4
    return weights


def nvfp4_layers(model: nn.Module) -> dict[str, NVFP4Linear]:
    """The layers of a model that are stored in NVFP4, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NVFP4Linear)}
