"""LoRA on layers in NVFP4: PEFT's own layer, except for merging, which has to quantize the sum."""

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from .format import quantize
from .linear import NVFP4Linear


class NVFP4LoraLinear(LoraLinear):
    """PEFT's LoRA layer around an `NVFP4Linear`."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Dequantize the weight, add the adapters, and quantize the sum by the layer's rule: once, for all
        adapters together.

        Raises:
            ValueError: If the sum has infinities or NaN.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            return
        layer = self.get_base_layer()
        assert isinstance(layer, NVFP4Linear)  # by which `adopt_lora_layers` chooses this class
        weight = layer.dequantize(torch.float32)
        present = [name for name in adapter_names if name in self.lora_A]
        for name in present:
            weight += self.get_delta_weight(name).to(weight)
        layer.store(quantize(weight, layer.weight_scale_rule, layer.weight_block))
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


def adopt_lora_layers(model: nn.Module) -> None:
    """Give PEFT's layers around NVFP4 weights the class that can merge them. (PEFT chooses classes by a configuration
    that diffusers creates internally, so there is no way to set the class beforehand.)"""
    for module in model.modules():
        if type(module) is LoraLinear and isinstance(module.get_base_layer(), NVFP4Linear):
            module.__class__ = NVFP4LoraLinear
