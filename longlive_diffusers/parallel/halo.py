"""Run diffusers' VAE on a part of the picture only, with the result of running it on the whole.

Most of what a VAE does is done to each column of the picture by itself. A convolution also reads the columns next to
it; at the borders of the picture it is given zeros in their place, which diffusers' modules pad on. A rank that has
only some of the columns (see `columns.py`) has such a border where its neighbor's columns begin. There it needs what
the neighbor has, its *halo*, instead of zeros:

    whole picture     0 | a b c d e | 0
    rank 0            0 | a b c | d              d: the first column of rank 1
    rank 1                  c | d e | 0          c: the last column of rank 0

Each rank pads its own part as always, then puts the columns that its neighbors hand over into the padding. The next
convolution makes exactly the rank's own columns of it, hence nothing is computed twice and no error grows: unlike
overlapping tiles this is exact. Wan's VAE also has attention over the picture: there, the keys and values of all ranks
are gathered, and a rank answers its own queries.

`HaloExchange` is not told of modules. It sees the operators that are called while it is active, in its own thread, and
knows three kinds: those that need other columns (padding, convolution, attention), those that treat each column by
itself, and those that combine entries along some dimension, which must not be that of the columns. All others raise:
a release of diffusers with another operator cannot give wrong pictures.

Rearrangements (views, permutations) are among the second kind: that pictures are `[..., height, width]` again wherever
they are padded and convolved is taken for granted. A compiled VAE runs uncompiled while it is split.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from .columns import ColumnSplit


Tensor = torch.Tensor

# What does the same to each column, looks at none, or only rearranges.
_BY_COLUMN = {
    F.dropout,
    F.silu,
    torch.zeros_like,
    Tensor.__eq__,
    Tensor.__ne__,
    Tensor.add,
    Tensor.chunk,
    Tensor.clone,
    Tensor.contiguous,
    Tensor.float,
    Tensor.mul,
    Tensor.permute,
    Tensor.reshape,
    Tensor.squeeze,
    Tensor.to,
    Tensor.type_as,
    Tensor.unsqueeze,
    Tensor.view,
}
# What combines or parts entries along a dimension, and the position of this dimension among its arguments.
_ALONG_A_DIMENSION = {
    F.normalize: 2,
    torch.cat: 1,
    torch.stack: 1,
    Tensor.mean: 1,
    Tensor.repeat_interleave: 2,
    Tensor.split: 2,
}

_OF_A_PADDED_PICTURE = "of a split picture that is padded, and not yet convolved"


def exchanging_halos(split: ColumnSplit) -> AbstractContextManager:
    """What a VAE is to be called within on a rank's part of a picture; nothing, where the part is all of it."""
    return nullcontext() if split.is_whole else HaloExchange(split)


class HaloExchange(TorchFunctionMode):
    """
    Within `with HaloExchange(split):`, modules of Wan's VAE that are called with a rank's own columns compute those of
    the whole picture. Every rank of the group has to call the same modules. Not differentiable.

    Args:
        split: Who has which columns.

    Raises:
        NotImplementedError: Within, for an operator that may mix columns in a way that is not known here.
    """

    def __init__(self, split: ColumnSplit):
        super().__init__()
        self.split, self.axis = split, split.axis
        # Of the picture that was padded last, until it is convolved: its shape, and how many columns are its halo.
        self._padded_shape: torch.Size | None = None
        self._halo = 0
        self._needs_other_columns = {
            F.pad: self._pad,
            F.conv2d: partial(self._convolve, F.conv2d),
            F.conv3d: partial(self._convolve, F.conv3d),
            F.scaled_dot_product_attention: self._attend,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.compiler.is_compiling():
            # Raised while the VAE is traced, so that the compiler leaves the call to the uncompiled module.
            raise NotImplementedError("A VAE that is split over ranks is not compiled.")
        return _uncompiled(self._call, func, args, kwargs or {})

    def _call(self, func, args: tuple, kwargs: dict):
        if func in self._needs_other_columns:
            return self._needs_other_columns[func](*args, **kwargs)
        padded = self._is_padded(*args)
        if func is Tensor.__getitem__:
            result = self._index(*args)
        elif func is F.interpolate:
            result = self._interpolate(*args, **kwargs)
        else:
            if func in _ALONG_A_DIMENSION:
                self._check_dimension(func, args, kwargs)
            result = func(*args, **kwargs)
            # What gives no tensor, such as a type or a size, cannot change a picture; nor can reading an attribute.
            known = func in _BY_COLUMN or func in _ALONG_A_DIMENSION or func.__name__ == "__get__"
            if not known and _tensors([result]):
                raise NotImplementedError(
                    f"A VAE that is split over ranks uses {_name(func)}, which is not known to treat columns apart."
                )
        if padded and _tensors([result]) and not self._is_padded(result):
            raise NotImplementedError(f"{_name(func)} {_OF_A_PADDED_PICTURE}.")
        return result

    # -- what needs the columns of other ranks -----------------------------------------------------------------------

    def _pad(self, input: Tensor, pad, mode: str = "constant", value: float | None = None) -> Tensor:
        """Pad with zeros, then put the neighbors' columns in the place of those between ranks."""
        if self._is_padded(input):
            raise NotImplementedError(f"Padding {_OF_A_PADDED_PICTURE}.")
        position = -2 * self.axis - 2  # `pad` begins with the last axis
        left, right = list(pad)[position : position + 2] or (0, 0)
        if left == right == 0:
            return F.pad(input, pad, mode, value)
        if mode != "constant" or value or min(pad) < 0:
            raise NotImplementedError(f"Only zeros are padded on a picture that is split, got {pad}, {mode}, {value}.")
        width = input.shape[self.axis]
        narrowest = min(self.split.widths(width))
        if max(left, right) > narrowest:
            raise NotImplementedError(f"A padding of {left} and {right} columns, but a rank has only {narrowest}.")
        padded = F.pad(input, pad)
        from_before, from_after = self.split.exchange_edges(input, left, right)
        inner = padded
        for axis in range(-len(pad) // 2, 0):
            if axis != self.axis:  # the zeros around the picture are around its halo, too
                inner = inner.narrow(axis, pad[-2 * axis - 2], input.shape[axis])
        if from_before.numel():
            inner.narrow(self.axis, 0, left).copy_(from_before)
        if from_after.numel():
            inner.narrow(self.axis, left + width, right).copy_(from_after)
        self._padded_shape, self._halo = padded.shape, left + right
        return padded

    def _convolve(self, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
        if isinstance(padding, str):
            raise NotImplementedError(f"A convolution of a split picture with padding={padding!r}.")
        paddings = list(_for_each_axis(padding, weight))
        own_padding, paddings[self.axis] = paddings[self.axis], 0
        if own_padding:
            pad = [0] * (-2 * self.axis)
            pad[-2:] = own_padding, own_padding
            input = self._pad(input, pad)
        halo = self._halo if self._is_padded(input) else 0
        self._padded_shape = None
        step = _for_each_axis(stride, weight)[self.axis]
        reach = _for_each_axis(dilation, weight)[self.axis] * (weight.shape[self.axis] - 1)
        widths = self.split.widths(input.shape[self.axis] - halo)
        if any(width % step for width in widths):
            raise NotImplementedError(f"A stride of {step} over parts that are {widths} columns wide.")
        if not reach + 1 - step <= halo <= reach:
            raise NotImplementedError(
                f"A convolution that reaches over {reach} more columns, of a picture with {halo} padded on: its parts "
                "would not be those of the whole."
            )
        return function(input, weight, bias, stride, paddings, dilation, groups)

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs) -> Tensor:
        """Attend to the tokens of all ranks, in whatever order: nothing tells them apart but what they hold."""
        if attn_mask is not None or dropout_p or is_causal:
            raise NotImplementedError("Attention over a split picture with a mask, a causal rule or dropout.")
        key, value = self.split.gather(torch.stack([key, value]), axis=-2).unbind()
        return F.scaled_dot_product_attention(query, key, value, **kwargs)

    # -- what does not, under a condition ----------------------------------------------------------------------------

    def _interpolate(self, input, size=None, scale_factor=None, mode: str = "nearest", *args, **kwargs) -> Tensor:
        """Repeating each column equally often."""
        factor = scale_factor[self.axis] if isinstance(scale_factor, tuple | list) else scale_factor
        if size is not None or mode not in ("nearest", "nearest-exact") or factor is None or factor % 1 or factor < 1:
            raise NotImplementedError(
                f"Interpolation of a split picture to size={size}, scale_factor={scale_factor} with mode={mode!r}."
            )
        return F.interpolate(input, size, scale_factor, mode, *args, **kwargs)

    def _index(self, input: Tensor, index) -> Tensor:
        result = input[index]
        if result.ndim < -self.axis or result.shape[self.axis] != input.shape[self.axis]:
            raise NotImplementedError(f"Some of the columns of a split picture are selected: {index}.")
        return result

    def _check_dimension(self, func, args: tuple, kwargs: dict) -> None:
        position = _ALONG_A_DIMENSION[func]
        dimensions = args[position] if len(args) > position else kwargs.get("dim")
        dimensions = [dimensions] if isinstance(dimensions, int) else dimensions
        axis = _tensors([*args, *kwargs.values()])[0].ndim + (func is torch.stack) + self.axis
        if not dimensions or axis in dimensions or self.axis in dimensions:
            raise NotImplementedError(f"{_name(func)} along dimension {dimensions} of a picture that is split there.")

    def _is_padded(self, *arguments) -> bool:
        """Whether this is the picture that was padded last, or it is among them."""
        shape = self._padded_shape
        return shape is not None and any(tensor.shape == shape for tensor in _tensors(arguments))


_uncompiled: Callable = torch.compiler.disable(lambda function, *args: function(*args))


def _for_each_axis(setting, weight: Tensor) -> tuple[int, ...]:
    """A setting of a convolution, which may be one number for all axes."""
    return (setting,) * (weight.ndim - 2) if isinstance(setting, int) else tuple(setting)


def _tensors(args: Sequence) -> list[Tensor]:
    """The tensors among the arguments of an operator, also those of a list of them, as for `torch.cat`."""
    listed = (item for argument in args for item in (argument if isinstance(argument, tuple | list) else [argument]))
    return [item for item in listed if isinstance(item, Tensor)]


def _name(func) -> str:
    return resolve_name(func) or repr(func)
