"""What a forward with gradients sees of the cache: everything before the chunk, joined with the chunk's own.

Without gradients, a forward writes its keys and values into the cache and reads them there in place. With gradients,
attention must find in its backward what it read in the forward, while the cache goes on to the next chunk. So a
forward with gradients reads a copy, and of the copy the graph keeps only how to make it again: the chunk's own keys
and values, and the moment in the life of the cache that it saw (`cache_journal.py`). The backward makes the copies
again, one layer at a time. The chunk's own keys and values are written into the cache once, when the block has run; a
gradient checkpoint that runs it again sees the same history, and writes nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from .attend import attend
from .cache_journal import Moment, Place
from .frame_store import KEYS, VALUES, read_frames
from .layer_kv_cache import ChunkSlots, LayerCacheBase, first_tokens
from .saved_recipes import Recipe, in_plain_autograd, save_recipes


class ChunkHistory:
    """
    Stands in for the cache of one layer during a forward with gradients of the chunk in progress.

    It refers to the cache, which does not refer to it: it lives for as long as the graph of the forward.

    Args:
        layer: The cache of the layer.
        index: The layer's place in the network.
        moment: The moment whose history is seen.
        places: Where the history is: all filled slots but the chunk's own.
        chunk: The chunk in progress.
    """

    def __init__(
        self,
        layer: LayerCacheBase,
        index: int,
        moment: Moment,
        places: frozenset[Place],
        chunk: ChunkSlots,
    ):
        self._layer, self._index = layer, index
        self._moment, self._places, self._chunk = moment, places, chunk
        self._windows: tuple[torch.Tensor, torch.Tensor] | None = None  # of keys and values, while a block runs
        self._own: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._is_stored = False
        self.scratch = layer.scratch
        self.text: tuple[torch.Tensor, torch.Tensor] | None = None  # the cache's has no graph, and is not used

    def load(self) -> None:
        """Prepare for a forward of the chunk: nothing to do, because `run` must do it again in a checkpoint."""

    def run(self, block: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """Run a block of the network that attends to this history: in the forward and, with gradient checkpointing, in
        the backward again. Outside of the block, so that a compiled one does not depend on what was overwritten."""
        self._windows = (self._read(KEYS), self._read(VALUES))
        try:
            return block(*arguments)
        finally:
            self._windows = None
            if self._is_stored:
                self._own = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        raw_key: torch.Tensor,
        chunk: ChunkSlots,
        backend: AttentionBackendName | None,
    ) -> torch.Tensor:
        """Attend like [`LayerCacheBase.attend`], with the same bits; gradients flow through the chunk's own keys and
        values, and the history has none."""
        assert self._windows is not None  # a block that attends here is run by `run`
        windows, self._windows = self._windows, None
        self._own = (key.detach(), value.detach(), raw_key.detach())
        if torch.compiler.is_compiling():  # the compiler decides what is kept
            index = (chunk.samples, chunk.token_slots)
            keys, values = (
                window.transpose(1, 2).index_put(index, own.to(window.dtype)).to(own.dtype)
                for window, own in zip(windows, (key, value), strict=True)
            )
            return attend(query, keys, values, backend)
        keys, values = (
            _Join.apply(own, [window], chunk)  # in a list, a tensor is no input that would need a gradient
            for window, own in zip(windows, (key, value), strict=True)
        )
        if not in_plain_autograd():
            return attend(query, keys, values, backend, self.scratch)
        recipes = (Recipe(partial(self._join_again, part), [own]) for part, own in ((KEYS, key), (VALUES, value)))
        with save_recipes(*zip((keys, values), recipes, strict=True)):
            return attend(query, keys, values, backend)

    def store(self, chunk: ChunkSlots) -> None:
        """Write what the forward computed into the cache."""
        assert self._own is not None  # the block has run
        self._layer.write(*self._own, chunk)
        self._layer.store(chunk)
        self._own, self._is_stored = None, True

    def _join_again(self, part: int, own: list[torch.Tensor]) -> torch.Tensor:
        return _join(self._read(part), self._chunk, *own)

    def _read(self, part: int) -> torch.Tensor:
        """Return keys or values as they were at the moment, `[B, heads, length * tokens, head_dim]`, laid out like the
        cache; the chunk's own slots are to be overwritten."""
        window = self._layer.read(part, self._chunk.length)
        for overwritten, rows in self._moment.overwritten_since(part, self._places):
            stored = overwritten.frames[self._index]
            frames = window.new_empty(len(overwritten.places), window.shape[1], 1, *window.shape[3:])
            read_frames(stored, frames)
            index = torch.tensor(rows).to(window.device)
            window[overwritten.samples[index], :, overwritten.slots[index]] = frames[index, :, 0]
        return first_tokens(window, self._chunk.length)


def _join(window: torch.Tensor, chunk: ChunkSlots, own: torch.Tensor) -> torch.Tensor:
    """Write a chunk's own keys or values into a copy of the window, rounded as the cache rounds them, and return all,
    `[B, length * tokens, heads, head_dim]`."""
    window[chunk.samples, :, chunk.token_slots] = own.to(window.dtype)
    return window.to(own.dtype).transpose(1, 2)


class _Join(torch.autograd.Function):
    """A chunk's own keys or values among those of the history, which has no gradient; rounding to the dtype of the
    cache has the gradient of no rounding."""

    @staticmethod
    def forward(ctx, own: torch.Tensor, window: list[torch.Tensor], chunk: ChunkSlots) -> torch.Tensor:
        ctx.chunk = chunk
        return _join(window[0], chunk, own)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient[ctx.chunk.samples, ctx.chunk.token_slots], None, None
