"""Checkpoints that fit the embedded toy, in the layout in which the reference implementation saves its own."""

from pathlib import Path

import torch

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.assets import toy_pipeline_path


# diffusers' name of a module, and Wan's
RENAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".norm2.": ".norm3.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    ".scale_shift_table": ".modulation",
}


def toy_transformer() -> LongLiveTransformer3DModel:
    return LongLiveTransformer3DModel.from_pretrained(toy_pipeline_path(), subfolder="transformer")


def original_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    for new, old in RENAMES.items():
        name = name.replace(new, old)
    return name


def save_original_checkpoint(path: Path, seed: int = 1) -> dict[str, torch.Tensor]:
    """Write a transformer of the toy's sizes with other weights; returns them under diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in toy_transformer().state_dict().items()
    }
    generator_dict = {f"model.{original_name(name)}": tensor for name, tensor in weights.items()}
    torch.save({"generator": generator_dict, "step": 7}, path)
    return weights


def save_original_lora(path: Path, rank: int = 4, width: int | None = None) -> Path:
    """Write a LoRA of every self-attention query of the toy; `width` makes one for another model."""
    transformer = toy_transformer()
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for index, block in enumerate(transformer.blocks):
        rows, columns = block.attn1.to_q.weight.shape
        name = f"base_model.model.blocks.{index}.self_attn.q"
        layers[f"{name}.lora_A.weight"] = torch.randn(rank, width or columns, generator=generator)
        layers[f"{name}.lora_B.weight"] = 0.1 * torch.randn(width or rows, rank, generator=generator)
    torch.save({"generator_lora": layers}, path)
    return path
