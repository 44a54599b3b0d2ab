"""What `longlive bench` is asked to measure, and what the numbers depend on beside the machine."""

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..dtypes import dtype_name
from .environment import commit, device_name, versions
from .sizes import BenchSize


@dataclass(frozen=True)
class BenchOptions:
    """
    What `longlive bench` is asked to measure.

    Args:
        size_name: The name of the size.
        size: The sizes of the networks and of the video.
        device, dtype: The device and the dtype that the networks run in.
        num_devices: How many processes, each with a device of its own, make every video together.
        attention_backend: An attention backend of diffusers, or None for its default.
        nvfp4_backend: How products with weights in 4 bits are computed; None if weights are not quantized.
        compile: Whether the transformer's blocks are compiled.
        speed: What the models are optimized for, see `LongLivePipeline.optimize`.
        decoder: What makes the frames: "vae" or "tiny".
        stream: Further arguments of `LongLivePipeline.stream` that every video is made with, by name.
    """

    size_name: str
    size: BenchSize
    device: torch.device
    dtype: torch.dtype
    attention_backend: str | None = None
    nvfp4_backend: str | None = None
    compile: bool = False
    speed: str = "exact"
    decoder: str = "vae"
    stream: Mapping[str, Any] = field(default_factory=dict)
    num_devices: int = 1


def describe_setting(options: BenchOptions) -> dict[str, Any]:
    """Describe everything that the numbers depend on."""
    size = options.size
    config, scale = size.transformer, size.vae["scale_factor_spatial"]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(options.device),
        "device_type": options.device.type,
        "devices": options.num_devices,
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "load_average": load_average(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "dtype": dtype_name(options.dtype),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "attention_backend": options.attention_backend or "default",
        "compiled": options.compile,
        "nvfp4_backend": options.nvfp4_backend,
        "speed": options.speed,
        "decoder": options.decoder,
        "stream": dict(options.stream),
        "size": options.size_name,
        "layers": config["num_layers"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "heads": config["num_attention_heads"],
        "ffn": config["ffn_dim"],
        "pixels": [size.height * scale, size.width * scale],
        "latents": [size.height, size.width],
        "text_tokens": size.text_tokens,
        "chunk_size": size.chunk_size,
        "window_size": size.window_size,
        "sink_size": size.sink_size,
        "steps": size.num_inference_steps,
        "chunks": size.num_chunks,
        "frames_per_chunk": size.chunk_size * size.vae["scale_factor_temporal"],
        "frames": size.num_frames(size.num_chunks),
    }


def load_average() -> float | None:
    """Return how many processes have wanted to run in the last minute; None on systems that do not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
