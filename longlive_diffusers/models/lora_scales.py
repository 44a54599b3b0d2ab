"""Which LoRAs a network uses at the moment, and how much of each."""

from peft.tuners.lora import LoraLayer
from torch import nn


def lora_scales(model: nn.Module) -> tuple:
    """Return what has been chosen for every layer with LoRAs: which are active or merged, and their scales. Networks
    of the same weights and choices compute the same."""
    return tuple((name, *scales_of(layer)) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))


def scales_of(layer: LoraLayer) -> tuple:
    """Return what has been chosen for a layer with LoRAs."""
    chosen = (*layer.active_adapters, *layer.merged_adapters)
    return (layer.disable_adapters, *chosen, *sorted(layer.scaling.items()))
