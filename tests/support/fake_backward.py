"""Gradients on a GPU that is not there: autograd's own engine asks for a stream of the GPU at every node."""

from collections import Counter
from unittest import mock

import torch

from tests.support.fake_cuda import DeviceMismatch


@torch.no_grad()
def backward(loss: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """
    Compute the gradients of all parameters, like `loss.backward()`, whose engine needs a real GPU.

    Every node of the graph runs once all that it needs is there, on the sums of what its users return. Gradient
    checkpointing takes the number of a backward from the engine: this is number 1.
    """
    graph = _nodes_below(loss.grad_fn)
    missing = Counter(following for node in graph for following, _ in node.next_functions if following is not None)
    gradients: dict[object, dict[int, torch.Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready, found = [loss.grad_fn], {}
    with mock.patch("torch._C._current_graph_task_id", lambda: 1):
        while ready:
            node = ready.pop()
            given = gradients.pop(node, {})
            if hasattr(node, "variable"):
                found[node.variable] = given.get(0)
                continue
            results = _run(node, given) if given else (None,) * len(node.next_functions)
            for (following, index), result in zip(node.next_functions, results, strict=True):
                if following is None:
                    continue
                if result is not None:
                    sums = gradients.setdefault(following, {})
                    result = _fitted(result, following._input_metadata[index])
                    sums[index] = sums[index] + result if index in sums else result
                missing[following] -= 1
                if not missing[following]:
                    ready.append(following)
    return found


def _run(node, given: dict[int, torch.Tensor]) -> tuple:
    arguments = [given.get(index) for index in range(len(node._input_metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        # What a function takes besides tensors stands behind them, and has no place in the graph.
        results = node.apply(*arguments)
        return results[: len(node.next_functions)] if isinstance(results, tuple) else (results,)
    results = node(*arguments)
    return results if isinstance(results, tuple) else (results,)


def _fitted(gradient: torch.Tensor, expected) -> torch.Tensor:
    """Give a gradient the shape and the dtype of what it is a gradient of, as the engine does."""
    if gradient.device != expected.device:
        raise DeviceMismatch(f"a gradient on {gradient.device} should be on the same device as {expected.device}")
    if gradient.shape != expected.shape:
        gradient = gradient.sum_to_size(expected.shape)
    return gradient.to(expected.dtype)


def _nodes_below(root) -> list:
    found, pending = {root: None}, [root]
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is not None and node not in found:
                found[node] = None
                pending.append(node)
    return list(found)
