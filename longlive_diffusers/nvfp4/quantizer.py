"""NVFP4 as a quantization that diffusers knows: `from_pretrained(..., quantization_config=NVFP4Config())`.

Weights are quantized on the way in, tensor by tensor, so that a model is never in memory whole in its old precision. A
quantized model is saved like any other: safetensors with the three stored tensors in place of each weight, and
`quantization_config` in `config.json`, by which it is known when it is loaded again.
"""

import copy
import json
import re
from enum import StrEnum
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .backends import check_backend_name
from .format import BLOCK, BLOCKS, check_stored
from .linear import STORED, NVFP4Linear, nvfp4_layers
from .recipes import NVFP4Recipe
from .rules import scale_rule_named


class NVFP4Method(StrEnum):
    """What diffusers keeps its quantizers under; it reads `.value`."""

    NVFP4 = "longlive_nvfp4"


# Of a LongLive or Wan transformer: everything outside the blocks. They are few, and see the whole picture.
DEFAULT_MODULES_TO_NOT_CONVERT = ("patch_embedding", "condition_embedder", "proj_out")


class NVFP4Config(QuantizationConfigMixin):
    """
    Store the linear layers of a transformer in NVFP4.

    Args:
        weight_scale_rule, activation_scale_rule: Of the weights, and of what they are multiplied by: "mse" (as
            LongLive-2.0's 4-bit models), "mae", "abs_max", "static_6" or "static_4".
        weight_block: `(1, 16)`, or `(16, 16)` for a model that was trained with such blocks.
        backend: How products are computed: "auto", "scaled_mm", "te", "fp8", "w4a16" or "emulate"
            (see `backends.py`).
        modules_to_not_convert: Names, or beginnings of names at a dot, of modules that stay as they are; by default
            embeddings and the last layer.

    Raises:
        ValueError: For an unknown rule, block or backend.
    """

    def __init__(
        self,
        weight_scale_rule: str = "mse",
        activation_scale_rule: str = "mse",
        weight_block: tuple[int, int] = (1, BLOCK),
        backend: str = "auto",
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = NVFP4Method.NVFP4.value,
    ):
        for rule in (weight_scale_rule, activation_scale_rule):
            scale_rule_named(rule)
        check_backend_name(backend)
        if tuple(weight_block) not in BLOCKS:
            raise ValueError(f"`weight_block` is (1, 16) or (16, 16), got {weight_block}.")
        if quant_method != NVFP4Method.NVFP4.value:
            raise ValueError(f"An NVFP4Config is of the method {NVFP4Method.NVFP4.value!r}, got {quant_method!r}.")
        self.quant_method = NVFP4Method.NVFP4
        self.weight_scale_rule, self.activation_scale_rule = weight_scale_rule, activation_scale_rule
        self.weight_block = list(weight_block)
        self.backend = backend
        kept = DEFAULT_MODULES_TO_NOT_CONVERT if modules_to_not_convert is None else modules_to_not_convert
        self.modules_to_not_convert = list(kept)

    @classmethod
    def from_recipe(cls, recipe: NVFP4Recipe, num_blocks: int, backend: str = "auto") -> "NVFP4Config":
        """
        For a transformer of `num_blocks` blocks that was trained with a recipe: what it computed in NVFP4 then is
        stored so, rounded as it was in training's forward.
        """
        kept = [f"blocks.{index}" for index in range(num_blocks) if index not in recipe.chosen_blocks(num_blocks)]
        return cls(
            weight_scale_rule=recipe.weight_rule,
            activation_scale_rule=recipe.activation_rule,
            weight_block=(BLOCK, BLOCK),
            backend=backend,
            modules_to_not_convert=[*DEFAULT_MODULES_TO_NOT_CONVERT, *kept],
        )

    def to_dict(self) -> dict[str, Any]:
        """As it is written to `config.json`."""
        return {**copy.deepcopy(vars(self)), "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults."""
        defaults = NVFP4Config().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}

    def converts(self, name: str, module: nn.Module) -> bool:
        """Whether this configuration stores a module of that name in NVFP4."""
        if type(module) is not nn.Linear or module.in_features % BLOCK:
            return False
        if self.weight_block[0] > 1 and module.out_features % BLOCK:
            return False
        return not any(re.search(rf"(^|\.){re.escape(kept)}(\.|$)", name) for kept in self.modules_to_not_convert)

    def quantize_layer(self, linear: nn.Linear, name: str = "the layer") -> NVFP4Linear:
        """
        Raises:
            ValueError: Its weight has infinities or NaN.
        """
        try:
            return NVFP4Linear.from_linear(linear, **self._layer_options())
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantized: {error}") from error

    def empty_layer(self, linear: nn.Linear) -> NVFP4Linear:
        """A layer of the same sizes, on the meta device, for stored tensors to be put into."""
        return NVFP4Linear.empty_like(linear, **self._layer_options())

    def _layer_options(self) -> dict[str, Any]:
        return {
            "weight_scale_rule": self.weight_scale_rule,
            "activation_scale_rule": self.activation_scale_rule,
            "weight_block": tuple(self.weight_block),
            "backend": self.backend,
        }


def layers_to_convert(model: nn.Module, config: NVFP4Config) -> list[str]:
    """Names of the layers that a configuration stores in NVFP4.

    Raises:
        ValueError: There are none.
    """
    names = [name for name, module in model.named_modules() if config.converts(name, module)]
    if not names:
        raise ValueError(
            f"Nothing to quantize: {type(model).__name__} has no linear layer whose sizes are multiples of {BLOCK} "
            f"and which is not kept by {config.modules_to_not_convert}."
        )
    return names


def quantize_model(model: nn.Module, config: NVFP4Config) -> nn.Module:
    """Store a loaded diffusers model's layers in NVFP4, in place; it is then saved and shared as a quantized one.

    Raises:
        ValueError: It is quantized already, or has LoRA layers (fuse or unload them first), or nothing to quantize.
    """
    if nvfp4_layers(model):
        raise ValueError(f"This {type(model).__name__} is stored in NVFP4 already.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model has LoRA layers: fuse and unload them, or unload them, before it is quantized.")
    for name in layers_to_convert(model, config):
        model.set_submodule(name, config.quantize_layer(model.get_submodule(name), name))
    mark_quantized(model, config)
    return model


def mark_quantized(model: nn.Module, config: NVFP4Config) -> None:
    """Make diffusers take a model for what it is: one with NVFP4 layers."""
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer = NVFP4Quantizer(config, pre_quantized=True)
    model.register_to_config(quantization_config=config)


def check_layers(model: nn.Module) -> None:
    """
    Raises:
        ValueError: A stored tensor is missing, or damaged, or was written by another rule than the layer's.
    """
    for name, layer in nvfp4_layers(model).items():
        missing = [tensor for tensor in STORED if layer.get_buffer(tensor).device.type == "meta"]
        if missing:
            raise ValueError(f"The checkpoint has no {', '.join(f'{name}.{tensor}' for tensor in missing)}.")
        try:
            check_stored(layer.weight_nvfp4)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        layer.select_backend()


class NVFP4Quantizer(DiffusersQuantizer):
    """What diffusers' loader calls; users have no need of it."""

    use_keep_in_fp32_modules = True
    required_packages: list[str] = []

    def __init__(self, quantization_config: NVFP4Config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._converted: frozenset[str] = frozenset()

    def validate_environment(self, *args, device_map: dict | str | None = None, **kwargs) -> None:
        """Nothing beyond the package itself is needed."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch.float32 if torch_dtype is None else torch_dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        self._converted = frozenset(layers_to_convert(model, self.quantization_config))
        if self.pre_quantized:
            for name in self._converted:
                model.set_submodule(name, self.quantization_config.empty_layer(model.get_submodule(name)))
        model.config.quantization_config = self.quantization_config

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs
    ) -> bool:
        layer, _, tensor = param_name.rpartition(".")
        return layer in self._converted and tensor in (STORED if self.pre_quantized else ("weight",))

    def check_quantized_param_shape(self, param_name: str, expected: torch.Tensor, given: torch.Tensor) -> None:
        """
        Raises:
            ValueError: Another shape than the layer's. One number may be stored without dimensions.
        """
        if expected.numel() != given.numel() or (given.ndim and given.shape != expected.shape):
            raise ValueError(f"{param_name} is {tuple(given.shape)}, this model needs {tuple(expected.shape)}.")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs,
    ) -> None:
        name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(name)
        if self.pre_quantized:
            # As it is in the file: `param_value` was brought to the model's dtype, which is not this format's.
            stored = state_dict[param_name].to(target_device)
            expected = module.get_buffer(tensor)
            if stored.dtype != expected.dtype:
                raise ValueError(f"{param_name} is {stored.dtype}, NVFP4 needs {expected.dtype}.")
            module.register_buffer(tensor, stored.reshape(expected.shape))
        else:
            with torch.no_grad():
                module.weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
            model.set_submodule(name, self.quantization_config.quantize_layer(module, name))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        check_layers(model)
        return model

    def get_state_dict_and_metadata(self, state_dict: dict[str, Any], safe_serialization: bool = False):
        description = {"format": "nvfp4", **self.quantization_config.to_dict()}
        return state_dict, {"longlive_nvfp4": json.dumps(description, sort_keys=True)}

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for name, layer in nvfp4_layers(model).items():
            dtype = model.dtype if layer.bias is None else layer.bias.dtype
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(layer.dequantize(dtype))
            linear.bias = layer.bias
            model.set_submodule(name, linear)
        kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(kept)  # what `config` is; diffusers has no way to take a setting back
        return model


def register_quantizer() -> None:
    """Let diffusers find `NVFP4Config` and its quantizer by their method's name."""
    AUTO_QUANTIZER_MAPPING[NVFP4Method.NVFP4.value] = NVFP4Quantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[NVFP4Method.NVFP4.value] = NVFP4Config
