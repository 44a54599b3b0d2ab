"""Everything that `longlive bench` measures, and everything that the numbers depend on, as one JSON-like report."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..dtypes import DTYPES, dtype_name
from ..nvfp4.quantizer import NVFP4Config, quantize_model
from ..pipelines.pipeline_longlive import LongLivePipeline
from .environment import device_name, versions
from .kv_cache import measure_kv_caches
from .measure import peak_memory, reset_peak_memory, weights_bytes
from .models import random_pipeline
from .runs import measure_decode, measure_denoise, measure_forward, measure_matmul, measure_whole
from .sizes import BenchSize, forward_flops


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
        kv_cache_dtypes: The ways to store keys and values that are compared.
    """

    size_name: str
    size: BenchSize
    device: torch.device
    dtype: torch.dtype
    attention_backend: str | None = None
    nvfp4_backend: str | None = None
    compile: bool = False
    kv_cache_dtypes: tuple[str, ...] = ()
    num_devices: int = 1


def describe_setting(options: BenchOptions) -> dict[str, Any]:
    """Describe everything that the numbers depend on."""
    size = options.size
    config, scale = size.transformer, size.vae["scale_factor_spatial"]
    return {
        "device": device_name(options.device),
        "device_type": options.device.type,
        "devices": options.num_devices,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "dtype": dtype_name(options.dtype),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "attention_backend": options.attention_backend or "default",
        "compiled": options.compile,
        "nvfp4_backend": options.nvfp4_backend,
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
        "frames": size.num_frames(size.num_chunks),
    }


def measurements(
    options: BenchOptions, log_stage: Callable[[str], None], share: Callable[[LongLivePipeline], None]
) -> Iterator[dict[str, Any]]:
    """Run all measurements, in an order in which none disturbs the next. Processes that share the work run them
    together.

    Args:
        options: What to measure.
        log_stage: Called with the name of each stage as it begins.
        share: Shares the pipeline with the other processes, if there are any.

    Yields:
        The results of each stage, by name: seconds, bytes and FLOP/s.
    """
    size, device = options.size, options.device
    log_stage("the device's matrix products")
    matmul = {name: measure_matmul(device, DTYPES[name]) for name in ("float32", "bfloat16")}
    yield {"matmul_flops_per_second": matmul}
    log_stage("building the networks")
    pipe, embeds = build(options)
    share(pipe)
    yield {"weights_bytes": {"transformer": weights_bytes(pipe.transformer), "vae": weights_bytes(pipe.vae)}}

    log_stage("warming up")
    # To a compiler and to a GPU's libraries, each length of the cache is a new shape.
    warm_up = size.chunks_to_fill + 1 if options.compile or device.type == "cuda" else 2
    _, latents, _ = measure_denoise(pipe, size, embeds, device, warm_up)
    measure_decode(pipe, latents[:2], device)
    log_stage("one forward")
    forward = measure_forward(pipe, size, embeds, device)
    flops, name = forward_flops(size, options.num_devices), dtype_name(options.dtype)
    yield {
        "forward": forward,
        "forward_flops": flops,
        "forward_flops_per_second": flops / forward["seconds"],
        "forward_to_matmul": flops / forward["seconds"] / matmul[name] if name in matmul else None,
    }
    log_stage("denoising")
    seconds, latents, _ = measure_denoise(pipe, size, embeds, device, size.num_chunks)
    yield {
        "denoise_chunk": statistics.median(seconds[size.chunks_to_fill - 1 :]),
        "denoise_first_chunk": seconds[0],
        "denoise_all_chunks": sum(seconds),
    }
    log_stage("decoding")
    decode = measure_decode(pipe, latents, device)
    yield {"decode_chunk": statistics.median(decode[1:] or decode), "decode_first_chunk": decode[0]}
    del latents
    log_stage("whole videos")
    reset_peak_memory(device)
    synchronous = measure_whole(pipe, size, embeds, device, async_decode=False)
    memory, memory_counts = peak_memory(device)
    yield {
        "synchronous": synchronous,
        "kv_cache_bytes": synchronous["kv_cache_bytes"],
        "peak_memory_bytes": memory,
        "peak_memory_counts": memory_counts,
    }
    yield {"asynchronous": measure_whole(pipe, size, embeds, device, async_decode=True)}
    if options.kv_cache_dtypes:
        log_stage("kinds of KV cache")
        yield {"kv_caches": measure_kv_caches(pipe, size, embeds, device, options.kv_cache_dtypes)}


def build(options: BenchOptions) -> tuple[LongLivePipeline, torch.Tensor]:
    """Build the networks, and the embeddings of a prompt, `[1, text_tokens, text_dim]`."""
    size = options.size
    pipe = random_pipeline(size, options.device, options.dtype)
    if options.nvfp4_backend:
        quantize_model(pipe.transformer, NVFP4Config(backend=options.nvfp4_backend))
    if options.attention_backend:
        pipe.transformer.set_attention_backend(options.attention_backend)
    if options.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, size.text_tokens, size.transformer["text_dim"], generator=generator)
    return pipe, embeds.to(options.device, options.dtype)
