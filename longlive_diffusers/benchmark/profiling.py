"""What a forward and a chunk consist of, as torch's profiler sees them: which part takes the time, which attention
kernels run, how many kernels there are, and how often the host waits for the device."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.profiler_util import DeviceType, FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from .measure import synchronize


Part = Literal["attention", "linear", "rest"]
PARTS: tuple[Part, ...] = ("attention", "linear", "rest")

# These match the names of operators, and of kernels that no operator launches. Where attention is no operator, only it
# has batched products (those that choose blocks of keys are part of it).
_ATTENTION = re.compile(r"attention|attn|flash|fmha|sdpa|sage", re.IGNORECASE)
_ATTENTION_PRODUCT = re.compile(r"aten::(bmm|baddbmm|_softmax|softmax)$")
_LINEAR = re.compile(
    r"aten::(mm|addmm|linear|_scaled_mm|_addmm_activation|mkldnn_linear)$|mkldnn::|mkl::"
    r"|longlive_diffusers::\w*(matmul|linear)|.*(gemm|nvjet)",
    re.IGNORECASE,
)
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_CHUNK = "longlive bench: a chunk"


@dataclass(frozen=True)
class Work:
    """What was at work, an operator or a GPU's kernel, to which part it belongs, and for how long (any unit)."""

    name: str
    part: Part
    time: float


def kind_of(operator: str) -> Part:
    """Return whether an operator or a kernel, by its name, belongs to attention, to the linear layers, or to the
    rest."""
    if _ATTENTION.search(operator) or _ATTENTION_PRODUCT.match(operator):
        return "attention"
    return "linear" if _LINEAR.match(operator) else "rest"


def profile_forward(forward: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """
    Profile one forward.

    Returns:
        `shares`: the share of each part in the time, None where the profiler could not see the device at work;
        `attention_kernels`: the share of each kernel in the time of attention (on a CPU, of each operator, with all
        that it calls), by its name, the largest first; `kernels`: the number of kernels, copies and fills that were
        launched, None on a CPU.
    """
    events = _profile(forward, device)
    work = list(work_on_gpu(events) if device.type == "cuda" else work_on_cpu(events))
    total = sum(item.time for item in work)
    times: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    kernels: dict[str, float] = {}
    for item in work:
        times[item.part] += item.time
        if item.part == "attention":
            kernels[item.name] = kernels.get(item.name, 0.0) + item.time
    largest_first = sorted(kernels.items(), key=lambda kernel: -kernel[1])
    return {
        "shares": {part: time / total if total else None for part, time in times.items()},
        "attention_kernels": {name: time / times["attention"] for name, time in largest_first if time},
        "kernels": len(work) if device.type == "cuda" else None,
    }


def count_waits(make_chunk: Callable[[], object], device: torch.device) -> int:
    """Return how often the host waits for the GPU while a chunk is made."""

    def marked() -> None:
        with record_function(_CHUNK):
            make_chunk()

    return waits_in_chunk(_profile(marked, device))


def work_on_cpu(events: Iterable[FunctionEvent]) -> Iterator[Work]:
    """Return what each operator did by itself. What an operator of attention or a linear layer calls is a part of it,
    and bears the name of the innermost caller whose name says that it is attention."""
    for event in events:
        name = _caller_of(event).name
        yield Work(name, kind_of(name), event.self_cpu_time_total)


def work_on_gpu(events: Iterable[FunctionEvent]) -> Iterator[Work]:
    """Return every kernel, copy and fill. Each belongs to the part of the operator that launched it; where none did,
    or one that belongs to no part, its own name decides."""
    events = list(events)
    launched: Counter[str] = Counter()  # those that an operator launched are among the kernels, too
    for event in events:
        for kernel in event.kernels:
            launched[kernel.name] += 1
            part = kind_of(_caller_of(event).name)
            yield Work(kernel.name, kind_of(kernel.name) if part == "rest" else part, kernel.duration)
    for event in events:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        if launched[event.name] > 0:
            launched[event.name] -= 1
        else:
            yield Work(event.name, kind_of(event.name), event.time_range.elapsed_us())


def waits_in_chunk(events: Iterable[FunctionEvent]) -> int:
    """Return how many calls that wait for the GPU began within the chunk; the profiler itself waits after it."""
    events = [event for event in events if event.device_type == DeviceType.CPU]
    (chunk,) = (event.time_range for event in events if event.name == _CHUNK)
    return sum(event.name in _WAITS and chunk.start <= event.time_range.start < chunk.end for event in events)


def _caller_of(event: FunctionEvent) -> FunctionEvent:
    """Return the operator that an event is a part of: the innermost that is attention by its name, else the outermost
    that belongs to a part; the event itself if there is neither."""
    callers = [event]
    while callers[-1].cpu_parent is not None:
        callers.append(callers[-1].cpu_parent)
    for caller in callers:
        if _ATTENTION.search(caller.name):
            return caller
    return next((caller for caller in reversed(callers) if kind_of(caller.name) != "rest"), event)


def _profile(work: Callable[[], object], device: torch.device) -> list[FunctionEvent]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    # Kineto, which is under the profiler, logs to stderr when it starts and stops. It asks nothing but this variable.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=activities, acc_events=True) as profiler:
        work()
        synchronize(device)
    return list(profiler.events() or ())
