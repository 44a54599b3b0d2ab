"""What cannot be done any more when layers were changed: fused, given a LoRA, or made faster."""

from diffusers.models.attention import AttentionModuleMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..nvfp4.optimized_layers import check_not_in_fp8, check_not_optimized


def check_can_be_saved(model: nn.Module) -> None:
    """Raise a ValueError if a model, which is to be saved, could not be loaded again: its layers are in FP8, have a
    LoRA, also one that is fused, or fused projections."""
    check_not_in_fp8(model)
    if with_lora := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise ValueError(
            f"{len(with_lora)} layers have a LoRA, for instance {with_lora[0]}, with which the model could not be "
            "loaded again: call `unload_lora_weights()` before it is saved, and `fuse_lora()` before that to keep the "
            "LoRA in it."
        )
    if fused := fused_projections(model):
        raise ValueError(
            f"{len(fused)} layers have fused projections, for instance {fused[0]}, with which the model could not be "
            "loaded again: call `unfuse_qkv_projections()` before it is saved."
        )


def check_takes_lora(model: nn.Module, *, is_there: bool = False) -> None:
    """
    Raise a ValueError if layers of a model are such that a LoRA would be left out, optimized or fused, or would be
    stored in 8 bits.

    Args:
        model: The network.
        is_there: Whether the LoRA takes the place of one that is there, and is stored as that is.
    """
    if not is_there:
        check_not_in_8_bits(model)
    check_not_optimized(model, "have a LoRA")
    if fused := fused_projections(model):
        raise ValueError(
            f"{len(fused)} layers have fused projections, for instance {fused[0]}, which a LoRA would be left out of: "
            "call `unfuse_qkv_projections()` before the LoRA is loaded."
        )


def check_not_in_8_bits(model: nn.Module) -> None:
    """Raise a ValueError if parameters of a model, which is to have a LoRA, are stored in 8 bits and cast where their
    layers are called: PEFT would store the LoRA in 8 bits as well, and multiply by it as it is."""
    parameters = dict(model.named_parameters())
    if stored := [name for name, own in parameters.items() if own.is_floating_point() and own.dtype.itemsize < 2]:
        raise ValueError(
            f"{len(stored)} parameters are stored in 8 bits, for instance {stored[0]} "
            f"({parameters[stored[0]].dtype}), and a LoRA would be, too: load it before `enable_layerwise_casting`."
        )


def fused_projections(model: nn.Module) -> list[str]:
    """The names of the attention layers whose projections are fused."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, AttentionModuleMixin)]
    return [name for name, layer in layers if layer.fused_projections]
