"""LoRAs that are scaled for one forward. Their layers hold the scales for all forwards and threads."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention_kwargs import check_attention_kwargs, lora_scale


class Turns:
    """Lets one forward at a time have a network's LoRAs. A copy of the network has turns of its own."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Turns"], tuple[()]]:
        return Turns, ()


def in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a network's method that changes its LoRAs wait for a forward that has them, in another thread: what it read
    or wrote meanwhile would be the scales of that forward."""

    @functools.wraps(method)
    def waiting(self, *args: Any, **kwargs: Any) -> Any:
        with self.lora_turns:
            return method(self, *args, **kwargs)

    return waiting


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
        turn = nullcontext() if torch.compiler.is_compiling() else self.lora_turns  # a compiler knows no locks
        with turn, scaled_loras(self, lora_scale(attention_kwargs)):
            return forward(self, *args, **kwargs)

    return scaled


@contextmanager
def scaled_loras(model: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the scales of a network's LoRAs in the block."""
    layers = [] if scale == 1 else tuner_layers(model)
    with restoring_scales(layers):
        for layer in layers:
            layer.scale_layer(scale)
        yield


def with_present_scales(module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with the LoRA scales that `module` has now, also where a checkpoint runs it again, in the backward,
    when they have been put back."""
    layers = tuner_layers(module)
    present = [dict(layer.scaling) for layer in layers]

    def again(*args: Any) -> Any:
        with restoring_scales(layers):
            for layer, scales in zip(layers, present, strict=True):
                layer.scaling.update(scales)
            return run(*args)

    return again


@contextmanager
def restoring_scales(layers: list[Any]) -> Iterator[None]:
    """Put back the scales of these layers when the block ends."""
    before = [dict(layer.scaling) for layer in layers]
    try:
        yield
    finally:
        for layer, scales in zip(layers, before, strict=True):
            layer.scaling.update(scales)


def tuner_layers(model: nn.Module) -> list[Any]:
    """Return PEFT's layers."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
