"""Checkpoints of the reference implementation, read as diffusers models, LoRAs and pipelines."""

from .convert import convert_checkpoint
from .lora import check_lora_fits, is_original_lora, read_original_lora
from .original import infer_transformer_config, load_original_transformer, read_original_state_dict


__all__ = [
    "check_lora_fits",
    "convert_checkpoint",
    "infer_transformer_config",
    "is_original_lora",
    "load_original_transformer",
    "read_original_lora",
    "read_original_state_dict",
]
