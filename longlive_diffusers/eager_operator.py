"""Operators of PyTorch that inference calls hundreds of times in a forward, without the detour through PyTorch's
dispatcher, which takes longer than what they do on the host: half as long as all else there."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class EagerOperator:
    """
    A custom operator, which is called by itself where nothing has to see an operator: without gradients, while nothing
    is compiled, and nothing (fake tensors, counters) looks at operators.

    Args:
        name: That of the operator, `namespace::name`.
        function: What it computes.
        mutates_args: The names of what it writes to.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Iterable[str]):
        self._function = function
        self.registered = torch.library.custom_op(name, mutates_args=mutates_args)(function)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
            return self.registered(*args, **kwargs)
        return self._function(*args, **kwargs)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Say what the operator returns, for those who ask without computing it."""
        return self.registered.register_fake(fake)


def eager_operator(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], EagerOperator]:
    """Make an operator of a function, like `torch.library.custom_op`."""
    return lambda function: EagerOperator(name, function, mutates_args)
