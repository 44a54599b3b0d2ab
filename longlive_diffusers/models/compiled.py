"""Functions that are compiled for one shape after the other, however many there are."""

import functools
from collections.abc import Callable, Hashable
from types import FunctionType

import torch


@functools.lru_cache(maxsize=64)
def compiled_for(function: Callable, shapes: Hashable) -> Callable:
    """
    Compile a function for inputs of these shapes; there is no graph for others in it.

    The compiler counts the graphs of a function's code object, whoever compiles it, and from the ninth on calls it
    uncompiled (`torch._dynamo.config.recompile_limit`). So the code is copied for each of the last 64 shapes.
    """
    assert isinstance(function, FunctionType)
    code, names = function.__code__.replace(), function.__globals__
    own = FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, dynamic=False)
