"""`attention_kwargs`, of which `{"scale": s}` is the only one: it scales the LoRA of a forward."""

import functools

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


def with_checked_attention_kwargs(forward):
    """Check `attention_kwargs` before diffusers multiplies the LoRA's weights by the scale in it, and divides them
    afterwards: a NaN would stay in them for good."""

    @functools.wraps(forward)
    def checked(self, *args, **kwargs):
        check_attention_kwargs(kwargs.get("attention_kwargs"))
        return forward(self, *args, **kwargs)

    return checked
