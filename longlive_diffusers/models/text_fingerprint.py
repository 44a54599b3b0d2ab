"""Whether the network would still compute the keys and values of the text that are cached.

They depend on a few layers only, and these rarely change in a stream; but they may at any time between two chunks and
in any callback, when a LoRA is chosen, scaled, fused, deleted or loaded again, or weights are written to, and nothing
tells. So what the layers are made of is compared, which costs a fraction of computing with them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..fused.layers import is_undecorated
from ..fused.packed_linear import PackedLinear
from .kv_cache import version_of
from .lora_scales import scales_of


NUM_SAMPLES = 16


def text_fingerprint(transformer: nn.Module) -> tuple | None:
    """
    Describe the layers that make keys and values of the text, to be compared (`==`) with an earlier description.

    Which tensors they have, in which memory, how often PyTorch has seen them change, which LoRAs act how much, and
    whether autocast is enabled. What is written to a tensor through its `.data` is not counted by PyTorch, and found
    by a few numbers of each tensor: so not if it is few numbers that change.

    Returns:
        The description; None where nothing is known for certain: away from the CPU, where to look at numbers would be
        to wait for the device, and computing anew costs next to nothing; for tensors of inference mode, whose changes
        are not counted; and for layers that do more than their weights say (hooks, other adapters than LoRA).
    """
    described: list[tuple] = [(torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))]
    for layer in text_layers(transformer):
        for module in layer.modules():
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if _does_more(module) or any(map(_is_uncounted, tensors)):
                return None
            scales = scales_of(module) if isinstance(module, LoraLayer) else ()
            packed = module.times_kept if isinstance(module, PackedLinear) else 0
            described.append((id(module), scales, packed, [_describe(tensor) for tensor in tensors]))
    return tuple(described)


def text_layers(transformer: Any) -> Iterator[nn.Module]:
    """Yield the layers that make keys and values of the text."""
    yield transformer.condition_embedder.text_embedder
    for block in transformer.blocks:
        attn = block.attn2
        yield from (attn.to_kv,) if attn.fused_projections else (attn.to_k, attn.to_v)
        yield attn.norm_k


def _does_more(module: nn.Module) -> bool:
    is_other_adapter = isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer)
    return is_other_adapter or not is_undecorated(module)


def _is_uncounted(tensor: torch.Tensor) -> bool:
    return type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.is_inference()


def _describe(tensor: torch.Tensor) -> tuple:
    numbers = tensor.detach().reshape(-1)
    samples = numbers[:: max(1, numbers.numel() // NUM_SAMPLES)]
    # A weak reference: memory that is freed is not taken for what is there afterwards.
    memory = StorageWeakRef(tensor.untyped_storage())
    return memory, tensor.storage_offset(), tensor.shape, tensor.dtype, version_of(tensor), samples.tolist()
