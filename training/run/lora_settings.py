"""The settings that are saved with a LoRA: all that its computation depends on."""

from typing import Any

from peft import LoraConfig


ALWAYS = ("r", "lora_alpha", "target_modules")
# What a LoRA is named, and how it was trained.
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "inference_mode",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
PLAIN_STARTS = (True, False, "gaussian")  # other initializations change the weights beneath, again when it is opened


def lora_settings(config: LoraConfig) -> dict[str, Any]:
    """Return the settings that say what a LoRA computes, without PEFT's defaults: a later release may have added some
    that an earlier one would not take."""
    defaults = LoraConfig().to_dict()
    return {
        name: value
        for name, value in config.to_dict().items()
        if name in ALWAYS
        or not (
            name in WITHOUT_EFFECT
            or value == defaults[name]
            or (name == "init_lora_weights" and value in PLAIN_STARTS)
        )
    }
