"""Counts what a GPU would have to do for a piece of code: operators that launch something, and the bytes they move.

A count of bytes says what an eager run costs at least beside its matrix products, whose FLOPs
`torch.utils.flop_counter` counts: every operator reads its inputs from memory and writes its outputs, once each.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"_unsafe_view"}  # whose schema does not say so
SELECTIONS = {"embedding", "gather", "index", "index_select"}  # read of their first input what they return
OVERWRITING = {"copy_", "fill_", "normal_", "random_", "uniform_", "zero_"}  # without reading it first
WRITES_OF_FRAMES = {"fp8_write_frames", "nvfp4_write_frames"}  # as many of a window as are chosen
WIDE = {torch.float32, torch.float64, torch.complex64}


@dataclass
class Count:
    """Kernels, the bytes they move, and how many of these are of float32, complex64 or float64."""

    kernels: int = 0
    num_bytes: int = 0
    wide_bytes: int = 0


@dataclass
class Totals(Count):
    """The sum over all operators, and the count of each, by its name."""

    by_operator: dict[str, Count] = field(default_factory=dict)


class Traffic(TorchDispatchMode):
    """
    While it is active, counts the operators that run on one kind of device; views and allocations do not count.

    An operator counts as one kernel: a reduction may take two on a GPU, and a custom operator any number. An element
    that is broadcast counts once, and of a buffer that is indexed only what is selected or overwritten.

    Args:
        device_type: "cpu" or "cuda". Operators on other devices are left out; copies between devices are in.
    """

    def __init__(self, device_type: str = "cuda"):
        super().__init__()
        self.device_type, self.totals = device_type, Totals()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        moved = moved_tensors(func, args, kwargs, result)
        if any(tensor.device.type == self.device_type for tensor in moved):
            by_operator = self.totals.by_operator.setdefault(func.overloadpacket.__name__, Count())
            sizes = [(distinct_bytes(tensor), tensor.dtype in WIDE) for tensor in moved]
            for count in (self.totals, by_operator):
                count.kernels += 1
                count.num_bytes += sum(size for size, _ in sizes)
                count.wide_bytes += sum(size for size, is_wide in sizes if is_wide)
        return result


def moved_tensors(func, args: tuple, kwargs: dict, result) -> list[torch.Tensor]:
    """Return the tensors that an operator reads, and those that it writes; none for views and allocations."""
    name = func.overloadpacket.__name__
    if func.namespace == "prim" or func.is_view or name in VIEWS or name in ALLOCATIONS:
        return []
    read, written = [], []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        (written if is_written else read).extend(tensors_in(value))
    if not written:
        written = tensors_in(result)
        if name in SELECTIONS:
            read[0] = written[0]
        elif name == "take_blocks":  # of keys and values
            read[:2] = written
    elif name == "index_put_":
        written = read[-1:]  # the new values
    elif name == "norm_rotate_and_write":
        # Of the caches, the slots of the keys and values; queries, keys, values and rotation are read in full.
        key, value, rotary, raw_keys = args[1], args[2], args[6], args[10]
        read, written = [args[0], key, value, rotary], [result, key, value] + [key] * (raw_keys is not None)
    elif name in WRITES_OF_FRAMES:
        window, chosen = args[:2]
        read = [window[:, :, : chosen.shape[1]]]
        written = [part[:, :, : chosen.shape[1]] for part in written]
    elif name.endswith("_") and name not in OVERWRITING:
        read += written
    return read + written


def tensors_in(value) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def distinct_bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor's elements; of a dimension that is expanded, those of one."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return prod(sizes) * tensor.element_size()


def most_moving(totals: Totals, count: int) -> list[tuple[str, Count]]:
    """The operators that move the most bytes, by name."""
    sizes = Counter({name: found.num_bytes for name, found in totals.by_operator.items()})
    return [(name, totals.by_operator[name]) for name, _ in sizes.most_common(count)]
