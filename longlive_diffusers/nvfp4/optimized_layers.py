"""What cannot be done any more with layers that were exchanged for faster ones (`LongLivePipeline.optimize`)."""

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..fused.layers import is_compiled
from ..fused.packed_linear import PackedLinear
from .fp8_linear import FP8Linear


def check_not_optimized(model: nn.Module, purpose: str) -> None:
    """Raise a ValueError if layers were exchanged for faster ones, with which something cannot be done any more.

    Args:
        model: The network.
        purpose: What cannot be done with such a layer, after "cannot".
    """
    kinds = (FP8Linear, PackedLinear)
    if optimized := [name for name, layer in model.named_modules() if isinstance(layer, kinds)]:
        raise ValueError(
            f"The transformer was optimized: {len(optimized)} layers, for instance {optimized[0]}, cannot {purpose}. "
            "Load the pipeline again, and call `optimize` last."
        )


def check_not_compiled_since(model: nn.Module) -> None:
    """Raise a ValueError if layers were exchanged for faster ones of a CPU, and compiled after that: the compiler
    cannot look into the layout of their weights."""
    for compiled in map(unwrap_module, filter(is_compiled, model.modules())):
        if packed := [name for name, layer in compiled.named_modules() if isinstance(layer, PackedLinear)]:
            raise ValueError(
                f"The transformer was compiled after it was optimized: {len(packed)} layers, for instance "
                f"{packed[0]}, cannot be compiled. Load the pipeline again, and call `optimize` last."
            )


def check_not_in_fp8(model: nn.Module) -> None:
    """Raise a ValueError if a model, which is to be saved, has layers in FP8: there is no file format of them."""
    if in_fp8 := [name for name, module in model.named_modules() if isinstance(module, FP8Linear)]:
        raise ValueError(
            f"{len(in_fp8)} layers were made FP8 for speed, for instance {in_fp8[0]}, and cannot be saved: load the "
            "model again, and save it before it is optimized."
        )
