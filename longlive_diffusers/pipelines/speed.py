"""How fast, at what price: what `LongLivePipeline.optimize` changes on a device, and says of it.

There are three speeds. "exact" gives the same video to within rounding; "fast" computes in fewer bits where the device
is faster in them; "fastest" leaves out what costs most and is seen least. `benchmark/SPEED.md` has what each gains and
costs, measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.activations import GELU
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils.torch_utils import unwrap_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..fused.feed_forward import FusedGELU
from ..fused.layers import is_compiled, is_plain, is_undecorated
from ..fused.onednn import has_onednn
from ..fused.packed_linear import PackedLinear
from ..models.cudnn_attention import cudnn_unsupported_reason, has_cudnn_fp8
from ..models.layer_kv_cache import FP8_ATTENTION
from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..nvfp4.fp8_linear import FP8Linear, can_be_fp8, fp8_unsupported_reason
from ..nvfp4.linear import nvfp4_layers


SPEEDS = ("exact", "fast", "fastest")
CHANGE_WEIGHTS = ("fast", "fastest")
"""Speeds for which LoRAs have to be added to the weights before."""

FASTEST_ARGUMENTS: Mapping[str, Any] = MappingProxyType({"attention_density": 0.5})
"""What "fastest" has chunks made with on a CPU."""


@dataclass(frozen=True)
class SpeedPlan:
    """
    What was chosen.

    Args:
        speed: "exact", "fast" or "fastest".
        device: The device it was chosen for.
        choices: What was changed, each with its price, in a sentence.
        arguments: What is to be passed to the pipeline and to `stream`, besides.
    """

    speed: str
    device: torch.device
    choices: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"Speed '{self.speed}' on '{self.device}':", *(f"- {choice}" for choice in self.choices)]
        return "\n".join(lines if self.choices else [*lines, "- there is nothing to change"])


def arguments_of(speed: str | None, device: torch.device) -> dict[str, Any]:
    """Return what chunks are made with at a speed, beside the changed models; nothing else where it is None. A GPU
    takes as long to copy a part of the history as it would to attend to the rest of it."""
    return dict(FASTEST_ARGUMENTS) if speed == "fastest" and device.type == "cpu" else {}


def kv_cache_dtype_of(
    speed: str | None, device: torch.device, head_dim: int, attention_backend: str | None = None
) -> str | None:
    """
    Return what keys and values are stored as at a speed; None for the network's dtype.

    Args:
        speed: The speed, or None.
        device: Where the video is made.
        head_dim: The number of channels of an attention head.
        attention_backend: The attention kernel that was asked for, which then stays.
    """
    uses_fp8 = speed in CHANGE_WEIGHTS and attention_backend is None and has_cudnn_fp8(device, head_dim)
    return FP8_ATTENTION if uses_fp8 else None


def check_speed(speed: object) -> None:
    """Raise a ValueError unless there is such a speed."""
    if not isinstance(speed, str) or speed not in SPEEDS:
        raise ValueError(f"A speed is {', '.join(map(repr, SPEEDS))}, got {speed!r}.")


def optimize(
    transformer: LongLiveTransformer3DModel, vae: nn.Module | None, speed: str, device: torch.device
) -> SpeedPlan:
    """
    Change models in place for speed; see [`~longlive_diffusers.LongLivePipeline.optimize`].

    Raises:
        ValueError: For an unknown speed; for another than "exact", if the transformer has a LoRA that was not fused
            and unloaded.
    """
    check_speed(speed)
    has_lora = any(hasattr(module, "lora_A") for module in transformer.modules())
    if speed in CHANGE_WEIGHTS and has_lora:
        raise ValueError(
            f"Speed {speed!r} changes weights, and the transformer has a LoRA beside them: fuse it before, by "
            "`pipe.fuse_lora()` and `pipe.unload_lora_weights()`."
        )
    choices = []
    if speed in CHANGE_WEIGHTS:
        choices += _use_fewer_bits(transformer, vae, device)
    choices += _fuse_layers(transformer, device)
    arguments = arguments_of(speed, device)
    if speed in CHANGE_WEIGHTS and device.type == "cuda":
        choices += _choose_cache(transformer, speed, device, arguments)
    if "attention_density" in arguments:
        choices.append("Chunks attend to the half of the history that matters more: 2 % of error in a forward.")
    return SpeedPlan(speed, device, tuple(choices), arguments)


def _choose_cache(
    transformer: LongLiveTransformer3DModel, speed: str, device: torch.device, arguments: dict[str, Any]
) -> list[str]:
    """Add to the arguments what keys and values are stored as, and return what there is to say of it."""
    head_dim, backend = transformer.config.attention_head_dim, attention_backend_of(transformer)
    if kv_cache_dtype := kv_cache_dtype_of(speed, device, head_dim, backend):
        arguments["kv_cache_dtype"] = kv_cache_dtype
        return ["By `arguments`, attention in FP8, from a KV cache in FP8, which takes half the memory."]
    if reason := cudnn_unsupported_reason(device, head_dim):
        return [f"Attention stays as it is: in FP8, it {reason}."]
    return [f"Attention stays as it is: its backend is {backend!r}."]


def attention_backend_of(transformer: LongLiveTransformer3DModel) -> str | None:
    """Return the attention kernel that was set; None for the default."""
    block: Any = transformer.blocks[0]  # a list of modules does not say of which
    backend = block.attn1.processor._attention_backend
    return None if backend is None else str(backend.value)


def _fuse_layers(transformer: LongLiveTransformer3DModel, device: torch.device) -> list[str]:
    """Exchange layers for those whose products are faster and give the same to within rounding."""
    on_cpu = device.type == "cpu"
    if device.type != "cuda" and not (on_cpu and has_onednn(get_parameter_dtype(transformer.patch_embedding))):
        return []
    # The compiler cannot look into a layout of another library.
    packs = on_cpu and not any(map(is_compiled, transformer.modules()))
    config, patch = transformer.config, transformer.config.patch_size
    rows = config.chunk_size * (config.sample_height // patch[1]) * (config.sample_width // patch[2])
    num_fused = num_packed = 0
    for module, name, child in _layers_of(transformer):
        if type(child) is GELU and is_undecorated(child.proj):
            setattr(module, name, FusedGELU.sharing(child))
            num_fused += 1
    adapters = _adapters_of(transformer)
    for module, name, child in _layers_of(transformer):
        if packs and child not in adapters and is_plain(child, nn.Linear, device):
            setattr(module, name, PackedLinear(child, rows))
            num_packed += 1
    choices = []
    if num_fused:
        choices.append(f"{num_fused} products of feed-forward layers end in GELU: results differ by rounding.")
    if num_packed:
        choices.append(f"{num_packed} weights lie as the CPU multiplies them: results differ by rounding.")
    return choices


def _layers_of(transformer: LongLiveTransformer3DModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return each layer of the blocks, with the module that has it and its name there."""
    modules = [module for block in transformer.blocks for module in block.modules()]
    return [(module, name, child) for module in modules for name, child in module.named_children()]


def _adapters_of(transformer: LongLiveTransformer3DModel) -> set[nn.Module]:
    """Return what PEFT has put beside layers: its forward reads the weights, of which a packed layer makes copies. And
    layers that an adapter is fused into: it is taken out of the weight in place."""
    tuned = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    inner = {
        own
        for layer in tuned
        for name, child in layer.named_children()
        if name != "base_layer"
        for own in child.modules()
    }
    return inner | {layer.get_base_layer() for layer in tuned if layer.merged}


def _use_fewer_bits(transformer: LongLiveTransformer3DModel, vae: nn.Module | None, device: torch.device) -> list[str]:
    if device.type == "cpu":
        return _to_bfloat16(transformer, vae)
    if device.type != "cuda":
        return []
    reason = fp8_unsupported_reason(device)
    if reason is not None:
        return [f"Linear layers stay as they are: FP8 {reason}."]
    if layers := nvfp4_layers(transformer):
        if torch.cuda.get_device_capability(device) >= (10, 0):
            return ["Weights in NVFP4 stay as they are: the device multiplies in 4 bits."]
        for layer in layers.values():
            layer.set_backend("fp8")
        return ["Weights in NVFP4 are multiplied in FP8, of which a second copy is kept."]
    for module, name, child in _layers_of(transformer):
        if can_be_fp8(child):
            setattr(module, name, FP8Linear(child))
    return ["Linear layers of the blocks multiply in FP8: about 5 % of relative error in a forward."]


def _to_bfloat16(transformer: LongLiveTransformer3DModel, vae: nn.Module | None) -> list[str]:
    """Convert what is in float32, where the CPU has instructions for bfloat16."""
    if not has_onednn(torch.bfloat16):
        return ["The networks stay in float32: this CPU has no instructions for bfloat16."]
    models = [transformer, vae] if isinstance(vae, AutoencoderKLWan) else [transformer]
    if all(model.dtype == torch.bfloat16 for model in models):
        return []
    if not all(is_undecorated(unwrap_module(module)) for block in transformer.blocks for module in block.modules()):
        return ["The networks stay in their dtype: layers are offloaded or cast one by one, or have hooks."]
    kept = set(LongLiveTransformer3DModel._keep_in_fp32_modules)
    for layer in transformer.modules():
        if isinstance(layer, PackedLinear):
            layer.keep(layer.weight.bfloat16())
    for model in models:
        for name, parameter in model.named_parameters():
            is_kept = model is transformer and kept.intersection(name.split("."))
            if parameter.dtype == torch.float32 and not is_kept:
                parameter.data = parameter.data.bfloat16()
    return ["The networks compute in bfloat16: about 1 % of relative error in a forward."]
