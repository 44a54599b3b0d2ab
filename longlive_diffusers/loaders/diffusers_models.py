"""Whether weights that diffusers has read, or a network that diffusers has built, are what our network needs."""

from collections.abc import Mapping
from typing import Any

from diffusers import WanTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .names import first_names
from .original import check_against_model


def check_all_weights_loaded(info: Mapping[str, Any], model: nn.Module, source: object) -> None:
    """
    Check that a model took all of a checkpoint's weights and nothing else.

    diffusers only warns about weights that are missing or left over, and a model without some of its layers, or with
    random ones, makes noise.

    Args:
        info: What `from_pretrained(..., output_loading_info=True)` returns beside the model.
        model: The model.
        source: What the user calls the checkpoint.

    Raises:
        ValueError: If weights are missing or left over.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if not missing and not unexpected:
        return
    found = []
    if missing:
        found.append(f"lacks {len(missing)} of its weights ({first_names(missing, 3)})")
    if unexpected:
        found.append(f"has {len(unexpected)} weights that the model does not know ({first_names(unexpected, 3)})")
    blocks = {name.split(".")[1] for name in (*missing, *unexpected) if name.startswith("blocks.")}
    hint = f" Its config.json says num_layers={model.config['num_layers']}." if blocks else ""  # pyright: ignore
    raise ValueError(
        f"The checkpoint '{source}' is not of this {type(model).__name__}: it {' and '.join(found)}.{hint}"
    )


def check_plain_wan(wan: WanTransformer3DModel, empty: nn.Module) -> None:
    """
    Check that the weights of a Wan network are ordinary tensors, which our network can share.

    Args:
        wan: The network.
        empty: Our network for its configuration, on the meta device.

    Raises:
        ValueError: If it carries LoRA layers, is quantized (GGUF, Quanto, ...), or its weights have other names or
            shapes than its configuration says.
    """
    name = type(wan).__name__
    if any(isinstance(module, BaseTunerLayer) for module in wan.modules()):
        raise ValueError(
            f"This {name} carries a LoRA. Load the LoRA into the LongLive pipeline instead (load_lora_weights), "
            "or add it for good first: fuse_lora() and unload_lora() of the network."
        )
    weights = wan.state_dict()
    packed = [key for key, tensor in weights.items() if not tensor.is_floating_point()]
    if packed or "quantization_config" in wan.config:
        method = wan.config.get("quantization_config", "its weights are integers")
        raise ValueError(
            f"This {name} is quantized ({' '.join(str(method).split())[:80]}), which LongLive's network does not take "
            "over. Load it without quantization, or call its dequantize(), and store LongLive's network in 4 bits "
            "with NVFP4Config (`longlive quantize`)."
        )
    check_against_model(weights, empty)
