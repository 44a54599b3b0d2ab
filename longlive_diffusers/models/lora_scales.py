"""Which LoRAs a network uses at the moment, and how much of each."""

from peft.tuners.lora import LoraLayer
from torch import nn


def lora_scales(model: nn.Module) -> tuple:
    """Return what has been chosen for every layer with LoRAs: which are active or merged, and their scales. Networks
    of the same weights and choices compute the same."""
    return tuple(
        (name, layer.disable_adapters, *layer.active_adapters, *layer.merged_adapters, *sorted(layer.scaling.items()))
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    )
