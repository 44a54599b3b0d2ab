"""Attention to keys and values in FP8 by NVIDIA's cuDNN, through its Python package `nvidia-cudnn-frontend`.

PyTorch calls cuDNN too, for 16 bits only. The library is asked for a plan for each shape, once; a plan takes a second
the first time and a tenth of that for each further shape.
"""

import functools
import importlib
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ..eager_operator import eager_operator


PACKAGE = "nvidia-cudnn-frontend"
WEIGHT_SCALE = 256.0  # softmax's weights are at most 1, and E4M3 ends at 448
MOST_CHANNELS = 128


def cudnn_unsupported_reason(device: torch.device, head_dim: int) -> str | None:
    """Return why cuDNN cannot attend in FP8 here, as the end of a sentence; None if it can."""
    if device.type != "cuda":
        return f"needs a GPU, this is '{device.type}'"
    capability = torch.cuda.get_device_capability(device)
    if not (9, 0) <= capability < (12, 0):
        return f"needs a GPU of compute capability 9 to 11 (Hopper, Blackwell B200), this one has {capability}"
    if head_dim % 16 or head_dim > MOST_CHANNELS:
        return f"needs a head_dim in multiples of 16 up to {MOST_CHANNELS}, this network's is {head_dim}"
    if _load_cudnn() is None:
        return f"needs the package {PACKAGE}: pip install 'longlive-diffusers[fp8-attention]'"
    return None


@torch.compiler.assume_constant_result  # `torch.compile` cannot trace an import
def has_cudnn_fp8(device: torch.device, head_dim: int) -> bool:
    """Whether cuDNN can attend in FP8 here."""
    return cudnn_unsupported_reason(device, head_dim) is None


@eager_operator("longlive_diffusers::cudnn_fp8_attention")
def cudnn_fp8_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logit_scale: float
) -> torch.Tensor:
    """
    Attend in E4M3, unmasked: `softmax(logit_scale * query key^T) value`.

    Args:
        query: Codes, uint8 `[B, tokens, heads, head_dim]`.
        key, value: Codes, uint8 `[B, heads, length, head_dim]`, of which head_dim is dense.
        logit_scale: The factor of the products of queries and keys.

    Returns:
        Codes, uint8 `[B, tokens, heads, head_dim]`: numbers in the unit of the values.
    """
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    states = [part.view(torch.float8_e4m3fn) for part in (query.transpose(1, 2), key, value, result.transpose(1, 2))]
    sizes = tuple((tuple(part.shape), part.stride()) for part in states)
    with torch.cuda.device_of(query):
        plan = _plan(query.get_device(), logit_scale, sizes)
        stream = torch.cuda.current_stream(query.device).cuda_stream
        plan.run(states, _handle(query.get_device(), stream, threading.get_ident()))
    return result


@cudnn_fp8_attention.register_fake
def _(query, key, value, logit_scale) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Plan:
    """How cuDNN computes one shape: the graph, its four tensors in the order of `run`, and all others it is given."""

    graph: Any
    tensors: tuple[Any, ...]
    others: dict[Any, torch.Tensor]
    workspace_bytes: int

    def run(self, states: list[torch.Tensor], handle: Any) -> None:
        """Compute the last of the states, on the stream of the handle."""
        workspace = torch.empty(max(1, self.workspace_bytes), dtype=torch.uint8, device=states[0].device)
        self.graph.execute(dict(zip(self.tensors, states, strict=True)) | self.others, workspace, handle=handle)


@functools.lru_cache(maxsize=256)
def _plan(device: int, logit_scale: float, sizes: tuple) -> _Plan:
    cudnn = _load_cudnn()
    assert cudnn is not None  # `cudnn_unsupported_reason` was asked before
    kinds = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT
    )
    query, key, value = (
        graph.tensor(dim=list(shape), stride=list(strides), data_type=kinds.FP8_E4M3) for shape, strides in sizes[:3]
    )
    numbers = {
        "descale_q": 1.0,
        "descale_k": 1.0,
        "descale_v": 1.0,
        "descale_s": 1 / WEIGHT_SCALE,
        "scale_s": WEIGHT_SCALE,
        "scale_o": 1.0,
    }
    one = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1], "data_type": kinds.FLOAT}
    scales = {name: graph.tensor(**one) for name in numbers}
    attended, _, *largest = graph.sdpa_fp8(
        q=query, k=key, v=value, **scales, is_inference=True, attn_scale=logit_scale, name="attention"
    )
    shape, strides = sizes[3]
    attended.set_output(True).set_dim(list(shape)).set_stride(list(strides)).set_data_type(kinds.FP8_E4M3)
    for output in largest:  # of the weights and of the result; asked for by cuDNN, not by us
        output.set_output(True).set_dim(one["dim"]).set_stride(one["stride"]).set_data_type(kinds.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    others = {
        scales[name]: torch.full((1, 1, 1, 1), number, device=f"cuda:{device}") for name, number in numbers.items()
    }
    others |= {output: torch.empty(1, 1, 1, 1, device=f"cuda:{device}") for output in largest}
    return _Plan(graph, (query, key, value, attended), others, graph.get_workspace_size())


@functools.lru_cache(maxsize=64)
def _handle(device: int, stream: int, thread: int) -> Any:
    """A handle belongs to one stream, and is used by one thread at a time."""
    cudnn = _load_cudnn()
    assert cudnn is not None
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=stream)
    return handle


@functools.cache
def _load_cudnn() -> ModuleType | None:
    """Return cuDNN's package, or None if it cannot be imported. Tried once."""
    try:
        return importlib.import_module("cudnn")
    except Exception:  # a GPU library's import fails in many ways
        return None
