"""`longlive bench`: how fast this device makes video, with every number saying what it counts."""

import argparse
import json
import platform
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from ..loaders.convert import DTYPES
from ..models.kv_cache import PACKED_DTYPES, check_window
from ..nvfp4.backends import BACKENDS
from ..nvfp4.quantizer import NVFP4Config, quantize_model
from ..pipelines.inputs import resolve_size
from ..version import __version__
from . import arguments as types
from .bench_kv_cache import measure_kv_caches
from .bench_models import random_pipeline
from .bench_runs import measure_decode, measure_denoise, measure_forward, measure_matmul, measure_whole
from .bench_sizes import SIZES, BenchSize, check_bench_size, forward_flops, frames_in
from .bench_table import as_table
from .measure import device_name, peak_memory, reset_peak_memory, weights_bytes


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Measure speed and memory with random weights: nothing is downloaded. One video, batch 1, "
        "without guidance; text embeddings are random, so no text encoder runs.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--size", choices=SIZES, default="toy", help="of the networks (default: %(default)s)")
    parser.add_argument("--height", type=types.count, help="in pixels (default: the size's)")
    parser.add_argument("--width", type=types.count, help="in pixels (default: the size's)")
    parser.add_argument("--steps", type=types.count, help="solver steps of a chunk (default: 4)")
    parser.add_argument("--chunks", type=types.count, help="length of the video (default: the size's)")
    parser.add_argument("--window", type=types.count, help="latent frames in the KV cache (default: the size's)")
    parser.add_argument("--sink", type=types.size, help="latent frames never forgotten (default: the size's)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", type=types.device, help="default: cuda, where there is one, else cpu")
    parser.add_argument("--attention-backend", metavar="NAME", help="one of diffusers', such as flash or sage")
    parser.add_argument(
        "--nvfp4", choices=("auto", *BACKENDS), metavar="BACKEND", help="store the blocks' weights in 4 bits"
    )
    parser.add_argument(
        "--kv-caches",
        nargs="+",
        choices=("plain", "bfloat16", *PACKED_DTYPES),
        metavar="KIND",
        help="compare ways to store keys and values: plain (the network's dtype), bfloat16, fp8, nvfp4",
    )
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--threads", type=types.count, help="of the CPU (default: the size's, or torch's)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file, too")


def run(args: argparse.Namespace) -> int:
    """Measure, and print."""
    size = requested_size(args)
    if args.json and not Path(args.json).parent.is_dir():
        raise ValueError(f"cannot write '{args.json}': there is no folder '{Path(args.json).parent}'")
    if args.kv_caches and len(set(args.kv_caches)) < len(args.kv_caches):
        raise ValueError(f"--kv-caches names a kind twice: {' '.join(args.kv_caches)}")
    backends = sorted(backend.value for backend in AttentionBackendName)
    if args.attention_backend and args.attention_backend.lower() not in backends:
        raise ValueError(f"no attention backend '{args.attention_backend}': there are {', '.join(backends)}")
    device = args.device or types.default_device()
    dtype = DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    if size.threads is not None:
        torch.set_num_threads(size.threads)
    report = {"setting": describe_setting(args, size, device, dtype), "results": measure(args, size, device, dtype)}
    print(as_table(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def requested_size(args: argparse.Namespace) -> BenchSize:
    """The named size, with what the user changed.

    Raises:
        ValueError: for a height or width that the network cannot have, or a window that does not fit the chunks.
    """
    size = SIZES[args.size]()
    scale = size.vae["scale_factor_spatial"]
    pixels = resolve_size(args.height, args.width, {}, (size.height, size.width), scale, size.patch_size)
    changes = {
        "height": pixels.latent_height,
        "width": pixels.latent_width,
        "num_inference_steps": args.steps,
        "num_chunks": args.chunks,
        "window_size": args.window,
        "sink_size": args.sink,
        "threads": args.threads,
    }
    size = replace(size, **{name: value for name, value in changes.items() if value is not None})
    check_window(size.window_size, size.sink_size, size.chunk_size, True)
    check_bench_size(size)
    return size


def describe_setting(
    args: argparse.Namespace, size: BenchSize, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """All that the numbers depend on."""
    config, scale = size.transformer, size.vae["scale_factor_spatial"]
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "longlive_diffusers": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "dtype": str(dtype).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "attention_backend": args.attention_backend or "default",
        "compiled": args.compile,
        "nvfp4_backend": args.nvfp4,
        "size": args.size,
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
        "frames": frames_in(size.num_chunks, size),
    }


def measure(args: argparse.Namespace, size: BenchSize, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All measurements, in an order in which none disturbs the next; seconds, bytes and FLOP/s."""
    tell("the device's matrix products")
    matmul = {name: measure_matmul(device, DTYPES[name]) for name in ("float32", "bfloat16")}
    tell("building the networks")
    pipe = random_pipeline(size, device, dtype)
    if args.nvfp4:
        quantize_model(pipe.transformer, NVFP4Config(backend=args.nvfp4))
    if args.attention_backend:
        pipe.transformer.set_attention_backend(args.attention_backend)
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, size.text_tokens, size.transformer["text_dim"], generator=generator).to(device, dtype)

    tell("warming up")
    # Each length of the cache is a shape of its own to a compiler and to a GPU's libraries.
    warm_up = size.chunks_to_fill + 1 if args.compile or device.type == "cuda" else 2
    _, latents, _ = measure_denoise(pipe, size, embeds, device, warm_up)
    measure_decode(pipe, latents[:2], device)
    tell("one forward")
    forward = measure_forward(pipe, size, embeds, device)
    tell("denoising")
    seconds, latents, _ = measure_denoise(pipe, size, embeds, device, size.num_chunks)
    tell("decoding")
    decode = measure_decode(pipe, latents, device)
    del latents
    tell("whole videos")
    reset_peak_memory(device)
    synchronous = measure_whole(pipe, size, embeds, device, async_decode=False)
    memory, memory_counts = peak_memory(device)
    asynchronous = measure_whole(pipe, size, embeds, device, async_decode=True)
    caches = {}
    if args.kv_caches:
        tell("kinds of KV cache")
        caches = measure_kv_caches(pipe, size, embeds, device, args.kv_caches)
    flops, name = forward_flops(size), str(dtype).removeprefix("torch.")
    return {
        "matmul_flops_per_second": matmul,
        "forward": forward,
        "forward_flops": flops,
        "forward_flops_per_second": flops / forward["seconds"],
        "forward_to_matmul": flops / forward["seconds"] / matmul[name] if name in matmul else None,
        "denoise_chunk": statistics.median(seconds[size.chunks_to_fill - 1 :]),
        "denoise_first_chunk": seconds[0],
        "denoise_all_chunks": sum(seconds),
        "decode_chunk": statistics.median(decode[1:] or decode),
        "decode_first_chunk": decode[0],
        "synchronous": synchronous,
        "asynchronous": asynchronous,
        "weights_bytes": {"transformer": weights_bytes(pipe.transformer), "vae": weights_bytes(pipe.vae)},
        "kv_cache_bytes": synchronous["kv_cache_bytes"],
        "kv_caches": caches,
        "peak_memory_bytes": memory,
        "peak_memory_counts": memory_counts,
    }


def tell(stage: str) -> None:
    """Progress goes to stderr, so that stdout is the table alone."""
    print(f"longlive bench: {stage} ...", file=sys.stderr, flush=True)
