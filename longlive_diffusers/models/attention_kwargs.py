"""`attention_kwargs`, of which `{"scale": s}` is the only one: it scales the LoRAs of a forward."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..number_checks import is_finite


Scales = list[tuple[dict[str, float], dict[str, float]]]
"""Of each layer with LoRAs, its own dictionary of scales, and what is to be in it."""


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


class Turns:
    """Lets one forward at a time have a network's LoRAs, whose scales its layers hold for all threads. A copy of the
    network has turns of its own."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Turns"], tuple[()]]:
        return Turns, ()


def with_lora_scale(forward):
    """Check the `attention_kwargs` of a forward, and let its LoRAs have that scale, and no other forward's.

    diffusers' own multiplies the layers' scales and divides them afterwards, which loses them if the scale is 0 or
    the product infinite.
    """
    position = list(inspect.signature(forward).parameters).index("attention_kwargs") - 1

    @functools.wraps(forward)
    def scaled(self, *args, **kwargs):
        attention_kwargs = args[position] if len(args) > position else kwargs.get("attention_kwargs")
        check_attention_kwargs(attention_kwargs)
        if "peft_config" not in vars(self):
            return forward(self, *args, **kwargs)
        scale = lora_scale(attention_kwargs)
        if torch.compiler.is_compiling():  # which knows no locks
            with scaled_loras(self, scale):
                return forward(self, *args, **kwargs)
        with self.lora_turns, scaled_loras(self, scale):
            return forward(self, *args, **kwargs)

    return scaled


@contextmanager
def scaled_loras(model: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the scales of a network's LoRAs in the block."""
    layers = [] if scale == 1 else list(_tuner_layers(model))
    before = _scales_of(layers)
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        _set_scales(before)


def with_present_scales(module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with the LoRA scales that `module` has now, also where a checkpoint runs it again, in the backward,
    when they have been put back."""
    layers = list(_tuner_layers(module))
    present = _scales_of(layers)

    def again(*args: Any) -> Any:
        before = _scales_of(layers)
        _set_scales(present)
        try:
            return run(*args)
        finally:
            _set_scales(before)

    return again


def _tuner_layers(model: nn.Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))


def _scales_of(layers: Iterable[Any]) -> Scales:
    return [(layer.scaling, dict(layer.scaling)) for layer in layers]


def _set_scales(scales: Scales) -> None:
    for scaling, values in scales:
        scaling.update(values)
