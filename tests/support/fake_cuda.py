"""A GPU that is not there: tensors on it have shapes, dtypes and strides, but no numbers.

With PyTorch's fake tensors, and a build that knows CUDA, code runs as it would on a GPU, at any size, and operators
refuse tensors of different devices. What is missing is put in place here: answers to what a program asks of the GPU.
"""

import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

import longlive_diffusers
from tests.support.traffic import tensors_in


PACKAGE = os.path.dirname(longlive_diffusers.__file__) + os.sep
MISMATCH = re.compile(r"same device|different devices")
ANSWERS = {torch.bool: True, torch.float16: 0.0, torch.bfloat16: 0.0, torch.float32: 0.0, torch.float64: 0.0}


class DeviceMismatch(RuntimeError):
    """An operator was given tensors of different devices."""


class Host(TorchDispatchMode):
    """
    The CPU's side of a program that runs on a fake GPU. It answers what only numbers could tell - whether something is
    true (yes), what a number is (0), where a tensor is not 0 (once, at its beginning) - and notes where the CPU has to
    wait for the GPU: for an answer, for a copy to the CPU, and for a copy to the GPU, unless it is asynchronous and
    from pinned memory.
    """

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "is_pinned":
            return getattr(args[0], "is_in_pinned_memory", False)
        if name == "_pin_memory":
            pinned = args[0].clone()
            pinned.is_in_pinned_memory = True
            return pinned
        inputs = tensors_in((args, kwargs))
        kinds = {tensor.device.type for tensor in inputs if tensor.ndim}
        if len(kinds) > 1 and func.namespace not in ("aten", "prim"):  # a custom operator does not look by itself
            raise DeviceMismatch(f"{func} got tensors on different devices: {', '.join(sorted(kinds))}")
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException:
            result = ANSWERS.get(inputs[0].dtype, 0)
        except DynamicOutputShapeException:
            result = inputs[0].new_zeros((1, inputs[0].ndim), dtype=torch.long)
            self._note("its answer decides a shape", inputs)
        self._look(func, name, args, kwargs, inputs, result)
        return as_cudnn_returns(result, inputs[0]) if name == "convolution" else result

    def _look(self, func, name: str, args: tuple, kwargs: dict, inputs: list[torch.Tensor], result) -> None:
        if name == "_local_scalar_dense":
            self._note("a number is read", inputs)
        elif name in ("_to_copy", "copy_"):
            source, target = (inputs[0], result) if name == "_to_copy" else (inputs[1], inputs[0])
            is_asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:3] == (True,))
            is_pinned = getattr(source, "is_in_pinned_memory", False)
            if source.device.type == "cpu" and target.device.type == "cuda" and not (is_asynchronous and is_pinned):
                self._note("copied to the GPU", [target])
            elif source.device.type == "cuda" and target.device.type == "cpu":
                self._note("copied to the CPU", [source])
        elif len({tensor.device.type for tensor in inputs if tensor.ndim}) > 1 and func.namespace != "prim":
            self._note(f"{name} takes an index from the CPU", inputs)

    def _note(self, what: str, tensors: list[torch.Tensor]) -> None:
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self.waits[f"{place()}: {what}"] += 1


def as_cudnn_returns(result: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The result of a convolution in the memory format of its input; without a GPU, a fake one forgets it."""
    last = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
    return result.contiguous(memory_format=last) if images.is_contiguous(memory_format=last) else result


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[Host]:
    """Have a GPU of this compute capability, on which all tensors are fake."""
    with (
        mock.patch("torch.cuda.get_device_capability", lambda *device: capability),
        # What autocast asks for. `torch.cuda.is_available` has to stay false: fake tensors would look for a driver.
        mock.patch("torch.cuda.is_bf16_supported", lambda *including_emulation: True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.Event", mock.Mock),  # nothing is timed
        mock.patch("torch.cuda.current_stream", mock.Mock),
        FakeTensorMode(allow_non_fake_inputs=True),
        Host() as host,
    ):
        yield host


def place() -> str:
    """Where in the package the current operator was called: file, line, function."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "outside of the package"
    return f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno} in {frame.f_code.co_name}"


def place_of(error: BaseException) -> str:
    """Where in the package an error came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
    if not frames:
        return "outside of the package"
    return f"{frames[-1].filename[len(PACKAGE) :]}:{frames[-1].lineno} in {frames[-1].name}"


def is_mismatch(error: RuntimeError) -> bool:
    """Whether an operator refused tensors of different devices."""
    return MISMATCH.search(str(error)) is not None


def on_gpu(
    build: Callable[[], torch.nn.Module], dtype: torch.dtype, kept_in_float32: Iterable[str] = ()
) -> torch.nn.Module:
    """Build a model on the fake GPU, in `dtype` but for the modules of these names."""
    with torch.device("meta"):
        model = build()
    kept = set(kept_in_float32)
    weights = {
        name: torch.empty(
            weight.shape, device="cuda", dtype=dtype if kept.isdisjoint(name.split(".")) else torch.float32
        )
        for name, weight in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()
