"""Write a LoRA in the reference's layout, the inverse of `read_original_lora`: Wan's own names of the modules, PEFT's
prefix, all under "generator_lora"."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .checkpoint_file import check_finite
from .lora import read_original_lora
from .lora_file import LoraFile


# diffusers' names of the layers that a LoRA may sit on, and Wan's: those of a block, and all others.
_BLOCK_LAYERS = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_OTHER_LAYERS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


def original_lora_state_dict(
    lora: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """
    Return a LoRA in the layout in which the reference saves its own.

    That layout has no place for alpha, which the reference takes to be the rank. Where it is another number, lora_B is
    multiplied by alpha / rank, as `read_original_lora` does; where it is the rank, the tensors are the given ones.

    Args:
        lora: The LoRA in diffusers' layout, `{"transformer.<layer>.lora_A.weight": [rank, in],
            "transformer.<layer>.lora_B.weight": [out, rank]}`, with one rank for all layers.
        metadata: diffusers' settings of the adapter (`transformer.lora_alpha`, ...), as
            `LongLivePipeline.lora_state_dict(..., return_lora_metadata=True)` returns them.

    Returns:
        `{"generator_lora": {"base_model.model.<Wan's layer>.lora_A.weight": [rank, in], ...}}`, for `torch.save`.

    Raises:
        ValueError: If it holds something besides lora_A and lora_B of the transformer's layers, if shapes or ranks
            disagree, if Wan's network has no such layer, or if a number is infinite or NaN.
    """
    settings = {name.removeprefix("transformer."): value for name, value in (metadata or {}).items()}
    folded = read_original_lora(LoraFile("The LoRA", lora, settings))
    renamed = {}
    for key, tensor in folded.items():
        layer, part = key.removeprefix("transformer.").split(".lora_")
        name = f"base_model.model.{_original_layer(layer)}.lora_{part}"
        check_finite(tensor, name)
        renamed[name] = tensor
    return {"generator_lora": renamed}


def _original_layer(name: str) -> str:
    """Return Wan's name of a layer."""
    block = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    original = _OTHER_LAYERS.get(name) if block is None else _BLOCK_LAYERS.get(block[2])
    if original is None:
        raise ValueError(f"The LoRA has a layer {name}, which has no counterpart in the reference's network.")
    return original if block is None else f"{block[1]}.{original}"
