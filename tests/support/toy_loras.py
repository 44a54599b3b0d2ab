"""Random LoRAs of the embedded model's shape, in the layout in which its distilled ones are stored."""

from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from longlive_diffusers import LongLivePipeline
from tests.support.short_toy import cut_blocks
from tests.support.toy_checkpoints import toy_transformer


RANK = 16
TARGETS = r"blocks\..*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"  # every Linear of the blocks


def save_toy_lora(
    folder: Path, seed: int, *, alpha: int = RANK, strength: float = 0.5, num_blocks: int | None = None
) -> Path:
    """
    Write a random LoRA of every Linear of the embedded model's blocks, in float16.

    Args:
        folder: The folder to write.
        seed: Of the random weights.
        alpha: The LoRA's alpha.
        strength: How much the LoRA changes each weight, in parts of the weight's own standard deviation.
        num_blocks: The number of blocks of the network that it is for, as of `short_toy_pipeline`; None for all.

    Returns:
        The file.
    """
    transformer = toy_transformer().float()
    if num_blocks is not None:
        cut_blocks(transformer, num_blocks)
    settings = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=True)
    transformer.add_adapter(settings)
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, tensor in get_peft_model_state_dict(transformer).items():
        if ".lora_A." in name:
            lora[name] = torch.randn(tensor.shape, generator=generator) / RANK**0.5
        else:
            layer = transformer.get_submodule(name.split(".lora_B.")[0]).get_base_layer()
            spread = strength * layer.weight.std().item() * RANK / alpha
            lora[name] = spread * torch.randn(tensor.shape, generator=generator)
    LongLivePipeline.save_lora_weights(
        folder,
        transformer_lora_layers={name: tensor.half() for name, tensor in lora.items()},
        transformer_lora_adapter_metadata=settings.to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"
