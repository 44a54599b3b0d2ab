"""Operators of PyTorch that inference calls hundreds of times in a forward, without the detour through PyTorch's
dispatcher, which takes longer than what they do on the host: half as long as all else there."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class EagerOperator:
    """
    A custom operator, which is called by itself where nothing has to see an operator: without gradients, while nothing
    is compiled or traced, and nothing (fake tensors, counters) looks at operators.

    Args:
        name: That of the operator, `namespace::name`.
        function: What it computes.
        mutates_args: The names of what it writes to.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Iterable[str]):
        self._function, self._mutated = function, frozenset(mutates_args)
        self._names = tuple(inspect.signature(function).parameters)
        self.registered = torch.library.custom_op(name, mutates_args=mutates_args)(function)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_seen() or any(_is_special(arg) for arg in (*args, *kwargs.values())):
            return self.registered(*args, **kwargs)
        result = self._function(*args, **kwargs)
        if self._mutated:
            given = dict(zip(self._names, args, strict=False)) | kwargs
            written = [given[name] for name in self._mutated if isinstance(given.get(name), torch.Tensor)]
            torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])
        return result

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Say what the operator returns, for those who ask without computing it."""
        return self.registered.register_fake(fake)


def _is_seen() -> bool:
    """Whether anything looks at the operators that are called now."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
        return True
    return torch.jit.is_tracing()


def _is_special(arg: Any) -> bool:
    """Whether an argument is a tensor of a kind that computes by itself, as fake ones do."""
    return isinstance(arg, torch.Tensor) and type(arg) is not torch.Tensor and type(arg) is not torch.nn.Parameter


def eager_operator(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], EagerOperator]:
    """Make an operator of a function, like `torch.library.custom_op`."""
    return lambda function: EagerOperator(name, function, mutates_args)
