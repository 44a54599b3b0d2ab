"""NVFP4 as a quantization method of diffusers: `from_pretrained(..., quantization_config=NVFP4Config())`.

Weights are quantized as they are loaded, tensor by tensor, so that a model is never completely in memory in its old
precision. A quantized model is saved like any other: safetensors with three stored tensors in place of each weight,
and `quantization_config` in `config.json`, by which it is recognized when it is loaded again.
"""

import copy
import inspect
import json
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..fused.layers import is_undecorated
from .backends import check_backend_name
from .format import BLOCK, BLOCKS, check_stored
from .linear import STORED, NVFP4Linear, nvfp4_layers
from .lora import release_lora_layers
from .optimized_layers import check_not_optimized
from .recipes import NVFP4Recipe
from .rules import scale_rule_named


class NVFP4Method(StrEnum):
    """The name under which diffusers registers the quantizer; diffusers reads `.value`."""

    NVFP4 = "longlive_nvfp4"


# Everything outside the blocks of a LongLive or Wan transformer: few layers, which everything passes through.
DEFAULT_MODULES_TO_NOT_CONVERT = ("patch_embedding", "condition_embedder", "proj_out")


class NVFP4Config(QuantizationConfigMixin):
    """
    Store the linear layers of a transformer in NVFP4.

    Args:
        weight_scale_rule, activation_scale_rule: The scale rules of the weights, and of the inputs that they are
            multiplied by: "mse" (like LongLive-2.0's 4-bit models), "mae", "abs_max", "static_6" or "static_4".
        weight_block: The blocks of the weights: `(1, 16)`, or `(16, 16)` for a model that was trained with these.
        backend: How products are computed: "auto", "scaled_mm", "te", "fp8", "w4a16" or "emulate"
            (see `backends.py`).
        modules_to_not_convert: Names, or parts of names between dots, of modules that stay as they are, with all that
            is in them; by default, the embeddings and the last layer. A string is one name. Each has to occur in the
            model.
        quant_method: The name of the method, as it stands in `config.json`; always "longlive_nvfp4".

    Raises:
        ValueError: If a rule, the block, the backend or the method is unknown, or a module is not given by its name.
    """

    def __init__(
        self,
        weight_scale_rule: str = "mse",
        activation_scale_rule: str = "mse",
        weight_block: tuple[int, int] = (1, BLOCK),
        backend: str = "auto",
        modules_to_not_convert: Iterable[str] | None = None,
        quant_method: str = NVFP4Method.NVFP4.value,
    ):
        for rule in (weight_scale_rule, activation_scale_rule):
            scale_rule_named(rule)
        check_backend_name(backend)
        if not isinstance(weight_block, (list, tuple)) or tuple(weight_block) not in BLOCKS:
            raise ValueError(f"`weight_block` is (1, 16) or (16, 16), got {weight_block}.")
        if quant_method != NVFP4Method.NVFP4.value:
            raise ValueError(f"An NVFP4Config is of the method {NVFP4Method.NVFP4.value!r}, got {quant_method!r}.")
        self.quant_method = NVFP4Method.NVFP4
        self.weight_scale_rule, self.activation_scale_rule = weight_scale_rule, activation_scale_rule
        self.weight_block = list(weight_block)
        self.backend = backend
        self.modules_to_not_convert = _names(modules_to_not_convert)

    @classmethod
    def from_recipe(cls, recipe: NVFP4Recipe, num_blocks: int, backend: str = "auto") -> "NVFP4Config":
        """
        Create the configuration for a transformer of `num_blocks` blocks that was trained with a recipe: the layers
        that computed in NVFP4 are stored in NVFP4, rounded as in the forward pass of training.
        """
        kept = [f"blocks.{index}" for index in range(num_blocks) if index not in recipe.chosen_blocks(num_blocks)]
        return cls(
            weight_scale_rule=recipe.weight_rule,
            activation_scale_rule=recipe.activation_rule,
            weight_block=(BLOCK, BLOCK),
            backend=backend,
            modules_to_not_convert=[*DEFAULT_MODULES_TO_NOT_CONVERT, *kept],
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs) -> Any:
        """Read the settings that stand in `config.json`.

        Raises:
            ValueError: If there is a setting that this class does not have, or the value of one is not possible.
        """
        known = inspect.signature(cls.__init__).parameters
        if unknown := sorted(set(config_dict) - set(known)):
            raise ValueError(
                f"The model's quantization_config has {', '.join(unknown)}, which {cls.__name__} does not know: the "
                "model was quantized by a newer release of longlive_diffusers, or its config.json was edited."
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are written to `config.json`."""
        return {**copy.deepcopy(vars(self)), "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults."""
        defaults = NVFP4Config().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}

    def converts(self, name: str, module: nn.Module) -> bool:
        """Whether this configuration stores a module of that name in NVFP4."""
        if type(module) is not nn.Linear or module.in_features % BLOCK:
            return False
        if self.weight_block[0] > 1 and module.out_features % BLOCK:
            return False
        return not any(_is_part(kept, name) for kept in self.modules_to_not_convert)

    def quantize_layer(self, linear: nn.Linear, name: str = "the layer") -> NVFP4Linear:
        """Quantize a layer; `name` is what an error calls it.

        Raises:
            ValueError: If its weight has infinities or NaN.
        """
        try:
            return NVFP4Linear.from_linear(linear, **self._layer_options())
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantized: {error}") from error

    def empty_layer(self, linear: nn.Linear) -> NVFP4Linear:
        """Create a layer of the same sizes, on the meta device, to be filled with stored tensors."""
        return NVFP4Linear.empty_like(linear, **self._layer_options())

    def _layer_options(self) -> dict[str, Any]:
        return {
            "weight_scale_rule": self.weight_scale_rule,
            "activation_scale_rule": self.activation_scale_rule,
            "weight_block": tuple(self.weight_block),
            "backend": self.backend,
        }


def _names(modules: Iterable[str] | None) -> list[str]:
    if modules is None:
        return list(DEFAULT_MODULES_TO_NOT_CONVERT)
    is_one = isinstance(modules, (str, bytes)) or not isinstance(modules, Iterable)
    names = [modules] if is_one else list(modules)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"`modules_to_not_convert` is a list of names of modules, got {modules!r}.")
    return names


def _is_part(kept: str, name: str) -> bool:
    """Whether `kept` is a module's name, or a part of it between dots."""
    return re.search(rf"(^|\.){re.escape(kept)}(\.|$)", name) is not None


def layers_to_convert(model: nn.Module, config: NVFP4Config) -> list[str]:
    """Return the names of the layers that a configuration stores in NVFP4.

    Raises:
        ValueError: If there are none, or a name of `modules_to_not_convert` does not occur in the model. (The default
            ones may be missing: other models have no such modules.)
    """
    modules = [name for name, _ in model.named_modules() if name]
    unknown = [
        kept
        for kept in config.modules_to_not_convert
        if kept not in DEFAULT_MODULES_TO_NOT_CONVERT and not any(_is_part(kept, name) for name in modules)
    ]
    if unknown:
        parts = dict.fromkeys(part for name in modules for part in name.split(".") if not part.isdigit())
        raise ValueError(
            f"{type(model).__name__} has no module {', '.join(map(repr, unknown))} to keep as it is. The parts of its "
            f"modules' names are {', '.join(parts)}, and numbers between them."
        )
    names = [name for name, module in model.named_modules() if config.converts(name, module)]
    if not names:
        raise ValueError(
            f"Nothing to quantize: {type(model).__name__} has no linear layer whose sizes are multiples of {BLOCK} "
            f"and which is not kept by {config.modules_to_not_convert}."
        )
    return names


def quantize_model(model: nn.Module, config: NVFP4Config) -> nn.Module:
    """Quantize the layers of a loaded diffusers model, in place; it is then saved and shared as a quantized model.

    Raises:
        ValueError: If it is quantized already or shared by several ranks, has LoRA layers (fuse or unload them
            first), layers that are offloaded or cast one by one, or nothing to quantize.
    """
    if vars(model).get("stream_ranks") is not None:
        raise ValueError("The model is shared by several ranks already: quantize it before `enable_parallelism`.")
    if nvfp4_layers(model):
        raise ValueError(f"This {type(model).__name__} is stored in NVFP4 already.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model has LoRA layers: fuse and unload them, or unload them, before it is quantized.")
    check_not_optimized(model, "be quantized")
    names = layers_to_convert(model, config)
    _check_only_computed(model, names)
    for name in names:
        model.set_submodule(name, config.quantize_layer(model.get_submodule(name), name))
    mark_quantized(model, config)
    return model


def _check_only_computed(model: nn.Module, names: list[str]) -> None:
    """Raise a ValueError if layers do more than to multiply by their weights, which would be lost with them, or have
    weights that are none until a hook has brought them."""
    layers = {name: model.get_submodule(name) for name in names}
    special = [name for name, layer in layers.items() if not is_undecorated(layer) or _is_in_8_bits(layer)]
    if special:
        raise ValueError(
            f"{len(special)} layers have hooks or weights of a special kind, for instance {special[0]}: quantize the "
            "model before layers are offloaded, cast one by one, or shared among devices."
        )


def _is_in_8_bits(layer: nn.Module) -> bool:
    return any(own.dtype.itemsize < 2 for own in layer.parameters(recurse=False))


def mark_quantized(model: nn.Module, config: NVFP4Config) -> None:
    """Make diffusers recognize a model that has NVFP4 layers as quantized."""
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer = NVFP4Quantizer(config, pre_quantized=True)
    model.register_to_config(quantization_config=config)


def check_layers(model: nn.Module) -> None:
    """
    Check the stored tensors of a model's NVFP4 layers, and select the layers' backends.

    Raises:
        ValueError: If a stored tensor is missing or damaged, or was written by another rule than the layer's.
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
    """The hooks that diffusers' loader calls; users do not need it."""

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
        """Check the shape of a stored tensor. A single number may be stored without dimensions.

        Raises:
            ValueError: If the shape is not the layer's.
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
            # Take it as it is in the file: `param_value` was cast to the model's dtype, which is not this format's.
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
        release_lora_layers(model)
        for name, layer in nvfp4_layers(model).items():
            dtype = model.dtype if layer.bias is None else layer.bias.dtype
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(layer.dequantize(dtype))
            linear.bias = layer.bias
            model.set_submodule(name, linear)
        kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(kept)  # what `config` reads; diffusers has no way to remove a setting
        return model


# diffusers finds the configuration and its quantizer by the name of the method.
AUTO_QUANTIZER_MAPPING[NVFP4Method.NVFP4.value] = NVFP4Quantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[NVFP4Method.NVFP4.value] = NVFP4Config
