"""LoRA on layers in NVFP4: PEFT's own layer, except for merging, which has to quantize the sum, and for the kinds of
LoRA that read a layer's weight, which is not there."""

from collections.abc import Iterable, Iterator
from dataclasses import fields

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from torch import nn

from ..wording import counted
from .format import quantize
from .linear import NVFP4Linear, nvfp4_layers


_BLIND_INITS = (True, False, "gaussian", "eva")  # `init_lora_weights` that do not look at the layer's weight
_TAKES = "a layer in NVFP4 takes plain LoRAs only: add it to the unquantized model, fuse it, and quantize the sum."


class NVFP4LoraLinear(LoraLinear):
    """PEFT's LoRA layer around an `NVFP4Linear`."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Dequantize the weight, add the adapters, and quantize the sum by the layer's rule: once, for all
        adapters together.

        Raises:
            ValueError: If the sum has infinities or NaN, or an adapter cannot be merged.
        """
        present = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not present:
            return
        if problems := [problem for name in present if (problem := _fusing_problem(self, name)) is not None]:
            raise ValueError(f"A LoRA cannot be fused: {problems[0]}.")
        layer = self.get_base_layer()
        assert isinstance(layer, NVFP4Linear)  # by which `adopt_lora_layers` chooses this class
        weight = layer.dequantize(torch.float32)
        for name in present:
            weight += self.get_delta_weight(name).to(weight)
        layer.store(quantize(weight, layer.weight_scale_rule, layer.weight_block))
        for name in present:
            if self.lora_bias[name]:
                assert layer.bias is not None  # see `_fusing_problem`
                layer.bias.data += (self.lora_B[name].bias * self.scaling[name]).to(layer.bias)
        self.merged_adapters += present

    def unmerge(self) -> None:
        """Refuse to unmerge, which is not possible.

        Raises:
            ValueError: If anything is merged: what rounding took away does not come back.
        """
        if self.merged:
            raise ValueError(
                "A LoRA that was fused into NVFP4 weights cannot be taken out again: the sum was rounded. Load the "
                "model again."
            )


def adopt_lora_layers(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Give PEFT's layers around NVFP4 weights the class that can merge them. (PEFT chooses classes by a configuration
    that diffusers creates internally, so there is no way to set the class beforehand.)

    Args:
        model: The network.
        adapter_names: The adapters that are to be fused; None for those that are active.

    Raises:
        ValueError: If one of them cannot be fused into a layer: nothing is fused then, which could not be undone.
    """
    layers = dict(_adapted_layers(model))
    problems = []
    for name, layer in layers.items():
        if not isinstance(layer, LoraLinear):
            problems.append(f"{name} has a {type(layer).__name__} adapter, and {_TAKES.removesuffix('.')}")
            continue
        chosen = layer.active_adapters if adapter_names is None else adapter_names
        present = [adapter for adapter in chosen if adapter in layer.lora_A and adapter not in layer.merged_adapters]
        found = [problem for adapter in present if (problem := _fusing_problem(layer, adapter)) is not None]
        problems += [f"{name}: {problem}" for problem in found]
    if problems:
        raise ValueError(f"{counted(len(problems), 'layer')} cannot be fused, for instance {problems[0]}.")
    for layer in layers.values():
        layer.__class__ = NVFP4LoraLinear


def release_lora_layers(model: nn.Module) -> None:
    """Give PEFT's layers around NVFP4 weights, which are about to be dequantized, PEFT's own class back.

    Raises:
        ValueError: If a LoRA is fused into one of them: it could not be taken out of the rounded sum.
    """
    layers = dict(_adapted_layers(model))
    if fused := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(
            f"{len(fused)} layers in NVFP4 have a fused LoRA, for instance {fused[0]}: call `unload_lora_weights()`, "
            "which leaves it in the weights, before they are dequantized."
        )
    adopted: list[LoraLinear] = [layer for layer in layers.values() if isinstance(layer, NVFP4LoraLinear)]
    for layer in adopted:
        layer.__class__ = LoraLinear


def check_takes_adapter(model: nn.Module, config: PeftConfig) -> None:
    """Raise a ValueError if an adapter would read or change the weight of a layer in NVFP4, of which there are only
    the codes: DoRA and other variants of LoRA, and first values that are computed from the weight."""
    if not isinstance(config, LoraConfig):
        return
    kinds = [
        f"`{field.name}`"
        for field in fields(config)
        if field.metadata.get("is_lora_variant") and vars(config)[field.name]
    ]
    if config.init_lora_weights not in _BLIND_INITS:
        kinds.append(f"`init_lora_weights` {config.init_lora_weights!r}")
    takes_all = config.target_modules == "all-linear"
    names = [name.removesuffix(".base_layer") for name in nvfp4_layers(model)]
    if kinds and (found := [name for name in names if takes_all or check_target_module_exists(config, name)]):
        raise ValueError(f"The LoRA has {' and '.join(kinds)}; {_named(found)} in NVFP4, and {_TAKES}")


def check_no_magnitudes(keys: Iterable[str], in_nvfp4: Iterable[str]) -> None:
    """Raise a ValueError if a LoRA has magnitudes (DoRA, arXiv 2402.09353) of layers in NVFP4: their norms are not
    known.

    Args:
        keys: The keys of the LoRA, with the diffusers names of the layers.
        in_nvfp4: The diffusers names of the layers that are in NVFP4; they may carry other LoRAs already.
    """
    names = {name.removesuffix(".base_layer") for name in in_nvfp4}
    of_magnitudes = [key.partition(".lora_magnitude_vector") for key in keys]
    if found := [name for name, part, _ in of_magnitudes if part and name in names]:
        raise ValueError(f"The LoRA is a DoRA; {_named(found)} in NVFP4, and {_TAKES}")


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Find PEFT's layers, of any kind, around layers in NVFP4."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), NVFP4Linear):
            yield name, module


def _fusing_problem(layer: LoraLinear, adapter: str) -> str | None:
    """Return why an adapter cannot be fused into a layer in NVFP4, or None if it can."""
    if adapter in layer.lora_variant:
        return f"adapter '{adapter}' is a {type(layer.lora_variant[adapter]).__name__}, and {_TAKES.removesuffix('.')}"
    if layer.lora_bias[adapter] and layer.get_base_layer().bias is None:
        return f"adapter '{adapter}' has a bias, and the layer has none"
    halves = (*layer.lora_A[adapter].parameters(), *layer.lora_B[adapter].parameters())
    if not all(half.isfinite().all() for half in halves):
        return f"adapter '{adapter}' has infinities or NaN"
    return None


def _named(layers: list[str]) -> str:
    verb = "is" if len(layers) == 1 else "are"
    return f"{counted(len(layers), 'layer')} that it is for, for instance {layers[0]}, {verb}"
