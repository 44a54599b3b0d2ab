"""Whether something may be computed with a layer's weights, in place of calling the layer, and by a fused kernel."""

from typing import TypeGuard, TypeVar

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..triton_launch import uses_kernels


Layer = TypeVar("Layer", bound=nn.Module)


def is_plain(layer: nn.Module, kind: type[Layer], device: torch.device) -> TypeGuard[Layer]:
    """
    Whether a layer computes what its class says, and nothing around it.

    Args:
        layer: The layer.
        kind: The class that it has to be of: a subclass, such as a layer with a LoRA or in few bits, is another.
        device: Where its parameters have to be. Offloaded ones are brought there by the call of the layer.
    """
    if type(layer) is not kind or not is_undecorated(layer):
        return False
    return all(own.device == device for own in layer.parameters(recurse=False))


def is_undecorated(layer: nn.Module) -> bool:
    """Whether a call of a layer is its class's `forward` on plain parameters: it has no hooks, none has replaced its
    `forward`, as offloading and casting layer by layer do, and no parameter is made of others, as one in few bits or
    in parts on several devices is."""
    if layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer):
        return False
    return not any(is_traceable_wrapper_subclass(own) for own in layer.parameters(recurse=False))


def is_compiled_in_place(layer: nn.Module) -> bool:
    """Whether `layer.compile()` was called."""
    return layer._compiled_call_impl is not None


def is_compiled(layer: nn.Module) -> bool:
    """Whether a layer is what `torch.compile` made of one, or it or its `forward` was compiled in place."""
    if is_compiled_module(layer) or is_compiled_in_place(layer):
        return True
    return hasattr(vars(layer).get("forward"), "_torchdynamo_orig_callable")


def is_for_inference() -> bool:
    """Whether fused kernels can be used: they have no gradients, and the compiler fuses by itself."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def uses_fused_kernels(tensor: torch.Tensor) -> bool:
    """Whether fused Triton kernels compute what lies where `tensor` does."""
    return is_for_inference() and uses_kernels(tensor)
