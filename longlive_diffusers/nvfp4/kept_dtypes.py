"""Buffers that keep their dtypes when a model is moved."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_dtypes(layer: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """
    Within this, `layer` may be moved, and its dtype changed, but that of these buffers stays: `.to(dtype)` is about
    the model's precision, not about the format in which a layer stores its weight.

    Args:
        layer: The layer.
        names: Those of its buffers.
    """
    stored = {name: layer.get_buffer(name) for name in names}
    yield
    for name, before in stored.items():
        after = layer.get_buffer(name)
        if after.dtype != before.dtype:
            setattr(layer, name, before.to(after.device))
