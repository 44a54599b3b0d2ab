"""Read the published files of the reference implementation as state dicts and LoRAs with diffusers' names, and write
LoRAs as it does."""

from .lora import check_lora_fits, is_original_lora, read_original_lora
from .lora_export import original_lora_state_dict
from .original import infer_transformer_config, load_original_transformer, read_original_state_dict


__all__ = [
    "check_lora_fits",
    "infer_transformer_config",
    "is_original_lora",
    "load_original_transformer",
    "original_lora_state_dict",
    "read_original_lora",
    "read_original_state_dict",
]
