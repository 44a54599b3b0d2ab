"""Which memory is still held after a piece of code has run, whoever holds it: a graph, an object, a cache."""

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageWatch(TorchDispatchMode):
    """Every storage met meanwhile but those of `ignored`; `alive_bytes` of those that somebody still holds."""

    def __init__(self, ignored: Iterable[torch.Tensor]):
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.ignored = {StorageWeakRef(tensor.untyped_storage()) for tensor in ignored}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return output

    def alive_bytes(self) -> int:
        return sum(
            size for storage, size in self.sizes.items() if storage not in self.ignored and not storage.expired()
        )
