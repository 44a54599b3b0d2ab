"""Saving, for a backward, how to make a tensor again in place of the tensor.

Attention saves the keys and values that it saw. Where these were put together for the call, from parts that live on
anyway, keeping them costs memory that grows with the history, and nothing is lost by putting them together again when
the backward needs them: the bits are the same, and no attention is computed twice.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """How a tensor was made: `make(parts)` makes it again, with the same bits and the same strides. The parts are
    saved for the backward in place of it."""

    make: Callable[[list[torch.Tensor]], torch.Tensor]
    parts: list[torch.Tensor]


@dataclass(frozen=True)
class _Packed:
    """Stands in the graph for a view of a tensor that has a recipe: the saved parts, and which view it is."""

    make: Callable[[list[torch.Tensor]], torch.Tensor]
    parts: list
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


@contextmanager
def save_recipes(*made: tuple[torch.Tensor, Recipe]) -> Iterator[None]:
    """
    Save the recipes of tensors for the backward in place of the tensors, which are recognized by their storage.

    Everything that is saved still goes through the hooks that were active before, which is why these are looked up:
    gradient checkpointing is a pair of such hooks, and would keep all of a layer if the tensors did not reach it.
    Without any, tensors are detached: an operator that saves its own result would else refer to itself in a circle,
    and its graph would outlive whoever forgets it without a backward.
    """
    recipes = {_storage(tensor): recipe for tensor, recipe in made}
    outer_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    outer_pack, outer_unpack = outer_hooks or (torch.Tensor.detach, _identity)

    def pack(tensor: torch.Tensor):
        recipe = recipes.get(_storage(tensor))
        if recipe is None:
            return outer_pack(tensor)
        parts = [outer_pack(part.detach()) for part in recipe.parts]
        return _Packed(recipe.make, parts, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(saved) -> torch.Tensor:
        if not isinstance(saved, _Packed):
            return outer_unpack(saved)
        whole = saved.make([outer_unpack(part) for part in saved.parts])
        return whole.as_strided(saved.size, saved.stride, saved.offset)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        recipes.clear()  # the graph may keep `pack` alive, which must not keep the parts alive


def saved_as_recipe(
    tensor: torch.Tensor, make: Callable[..., torch.Tensor], *parts: torch.Tensor
) -> AbstractContextManager[None]:
    """Within this, save the parts of which `make(*parts)` makes a tensor again, in place of the tensor; see
    [`save_recipes`]. Where eager autograd saves nothing, nothing changes."""
    if not in_plain_autograd():
        return nullcontext()
    return save_recipes((tensor, Recipe(lambda saved: make(*saved), list(parts))))


def in_plain_autograd() -> bool:
    """Whether eager autograd saves tensors for a backward, in a way that hooks can change.

    It does not while compiling, where the compiler decides what is saved; without gradients, where nothing is saved;
    and under a transform of `torch.func`, which forbids hooks and needs more of a function than a backward.
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # pyright: ignore[reportAttributeAccessIssue]
    )


def _storage(tensor: torch.Tensor) -> int:
    """An identifier of a tensor's storage; unlike an address, it is unique on the meta device too."""
    return tensor.untyped_storage()._cdata


def _identity(saved):
    return saved
