"""Which memory a piece of code holds at which moment, and what for; and how to run code without the memory.

`MemoryLedger` enters every storage that an operator returns, and notes when the last tensor of it is gone. `Simulated`
lets code run at any size on any machine: what is large has a shape, a dtype and a storage of a size, but no numbers.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


TRANSIENT = "transient"


class MemoryLedger(TorchDispatchMode):
    """
    While it is active, keeps account of the bytes of all storages, each counted once.

    What an operator allocates only for itself, inside of its kernel, is not seen; neither are the gaps between the
    blocks of a GPU's allocator.
    """

    def __init__(self):
        super().__init__()
        self._entries: list[tuple[int, int]] = []  # a storage's number, and its bytes: positive when it came to be
        self._sizes: list[int] = []  # by number
        self._labels: dict[int, str] = {}  # by number
        self._numbers: dict[int, int] = {}  # of the storages that are there, by `id`
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._enter(result)
        return result

    def label(self, tensors: Iterable[torch.Tensor], name: str) -> None:
        """Say what tensors are for. Tensors that were there before the ledger are entered now."""
        for number in self._enter(list(tensors)):
            self._labels[number] = name

    def label_the_rest(self, name: str) -> None:
        """Say what all storages are for that are there now, and have no label yet."""
        for number in self._numbers.values():
            self._labels.setdefault(number, name)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor, as if it never took any memory."""
        (left_out,) = self._enter(tensor)
        self._entries = [entry for entry in self._entries if entry[0] != left_out]
        self._sizes[left_out] = 0

    def begin(self) -> None:
        """Forget the past: a peak is one from now on."""
        self._entries = [(number, self._sizes[number]) for number in self._numbers.values()]

    def peak(self) -> Counter[str]:
        """Return the bytes at the moment when there were the most, by label."""
        held, most, moment = 0, 0, 0
        for index, (_, size) in enumerate(self._entries):
            held += size
            if held > most:
                most, moment = held, index
        there: dict[int, int] = {}
        for number, size in self._entries[: moment + 1]:
            if size > 0:
                there[number] = size
            else:
                there.pop(number, None)
        parts: Counter[str] = Counter()
        for number, size in there.items():
            parts[self._labels.get(number, TRANSIENT)] += size
        return parts

    @contextmanager
    def labelled(self, name: str) -> Iterator[None]:
        """Everything that comes to be meanwhile, and is still there at the end, is for this."""
        before = set(self._numbers.values())
        yield
        for number in set(self._numbers.values()) - before:
            self._labels[number] = name

    def _enter(self, values) -> list[int]:
        numbers = []
        for tensor in tree_leaves(values):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = id(storage)
            if key not in self._numbers:
                number = len(self._sizes)
                self._sizes.append(storage.nbytes())
                self._numbers[key] = number
                self._references[key] = weakref.ref(storage, lambda _, key=key: self._leave(key))
                self._entries.append((number, self._sizes[number]))
            numbers.append(self._numbers[key])
        return numbers

    def _leave(self, key: int) -> None:
        number = self._numbers.pop(key)
        del self._references[key]
        self._entries.append((number, -self._sizes[number]))


class Simulated(TorchDispatchMode):
    """
    While it is active, new tensors from some size on have no numbers, and neither has what is computed from them.

    Small tensors that depend on no large one are computed as always, so that bookkeeping works: indices, timesteps,
    shots. A number that is read of a simulated tensor (a norm, a loss) is 0, and two of them are equal.

    Args:
        from_bytes: The size from which on a new tensor is simulated.
    """

    def __init__(self, from_bytes: int = 2**20):
        super().__init__()
        self.from_bytes, self.fakes = from_bytes, FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        try:
            if any(isinstance(tensor, FakeTensor) for tensor in inputs):
                with self.fakes:
                    return func(*args, **kwargs)
            if not inputs:
                with self.fakes:
                    result = func(*args, **kwargs)
                if isinstance(result, torch.Tensor) and result.nbytes >= self.from_bytes:
                    return result
        except DataDependentOutputException:
            return True if func is torch.ops.aten.equal.default else 0.0
        return func(*args, **kwargs)
