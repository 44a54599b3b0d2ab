"""`attention_kwargs`, of which `{"scale": s}` is the only one: it scales the LoRAs of a forward."""

from typing import Any

from ..number_checks import is_finite


def check_attention_kwargs(attention_kwargs: object) -> None:
    """Raise a ValueError unless it is None, or a dict with nothing in it but a `scale` that is a finite number."""
    if attention_kwargs is None:
        return
    if not isinstance(attention_kwargs, dict):
        raise ValueError(f"`attention_kwargs` must be a dict, got {type(attention_kwargs).__name__}.")
    unknown = [name for name in attention_kwargs if name != "scale"]
    if unknown:
        raise ValueError(
            f"`attention_kwargs` may hold 'scale', the scale of the LoRA, and nothing else, got {unknown}."
        )
    if "scale" in attention_kwargs and not is_finite(attention_kwargs["scale"]):
        raise ValueError(
            f"The 'scale' of `attention_kwargs` must be a finite number, got {attention_kwargs['scale']!r}."
        )


def lora_scale(attention_kwargs: dict[str, Any] | None) -> float:
    """Return what the LoRAs of a forward are scaled by."""
    return 1.0 if attention_kwargs is None else attention_kwargs.get("scale", 1.0)
