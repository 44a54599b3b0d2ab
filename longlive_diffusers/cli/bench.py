"""`longlive bench`: how fast this device makes video, with every number saying what it counts."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from ..atomic_write import write_text
from ..benchmark.report import BenchOptions, make_report
from ..benchmark.sizes import SIZES, BenchSize, check_bench_size
from ..benchmark.table import as_table
from ..dtypes import DTYPES
from ..models.kv_cache import check_window
from ..nvfp4.backends import BACKENDS
from ..pipelines.inputs import resolve_size
from .arguments import add_cache_options, add_device_option, add_renamed, count, default_device


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Measure speed and memory with random weights: nothing is downloaded. One video, batch 1, "
        "without guidance; text embeddings are random, so no text encoder runs.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--size", choices=SIZES, default="toy", help="The sizes of the networks (default: %(default)s)."
    )
    parser.add_argument("--height", type=count, help="The height of the video in pixels (default: the size's).")
    parser.add_argument("--width", type=count, help="The width of the video in pixels (default: the size's).")
    parser.add_argument("--steps", type=count, help="The number of solver steps of each chunk (default: 4).")
    parser.add_argument("--chunks", type=count, help="The length of the video in chunks (default: the size's).")
    add_cache_options(parser, compares_dtypes=True)
    add_renamed(parser, "--kv-caches", "--kv-cache-dtype")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="The dtype of the networks (default: bfloat16 on a GPU, float32 on a CPU)."
    )
    add_device_option(parser)
    parser.add_argument(
        "--attention-backend", metavar="NAME", help="One of diffusers' attention backends, such as flash or sage."
    )
    parser.add_argument(
        "--nvfp4",
        choices=("auto", *BACKENDS),
        metavar="BACKEND",
        help="Store the blocks' weights in 4 bits, and multiply by this backend: auto, "
        f"{', '.join(BACKENDS)} (default: weights are not quantized).",
    )
    parser.add_argument("--compile", action="store_true", help="Compile the transformer's blocks.")
    parser.add_argument("--threads", type=count, help="Threads of the CPU (default: the size's, or torch's).")
    parser.add_argument("--json", metavar="FILE", help="Also write the numbers to this file.")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the report."""
    size = requested_size(args)
    if args.json and not Path(args.json).parent.is_dir():
        raise ValueError(f"cannot write '{args.json}': there is no folder '{Path(args.json).parent}'")
    if len(set(args.kv_cache_dtype)) < len(args.kv_cache_dtype):
        raise ValueError(f"--kv-cache-dtype names one twice: {' '.join(args.kv_cache_dtype)}")
    backends = sorted(backend.value for backend in AttentionBackendName)
    if args.attention_backend and args.attention_backend.lower() not in backends:
        raise ValueError(f"no attention backend '{args.attention_backend}': there are {', '.join(backends)}")
    device = args.device or default_device()
    if size.threads is not None:
        torch.set_num_threads(size.threads)
    options = BenchOptions(
        size_name=args.size,
        size=size,
        device=device,
        dtype=DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")],
        attention_backend=args.attention_backend,
        nvfp4_backend=args.nvfp4,
        compile=args.compile,
        kv_cache_dtypes=tuple(args.kv_cache_dtype),
    )
    report = make_report(options, log_stage)
    print(as_table(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    return 0


def requested_size(args: argparse.Namespace) -> BenchSize:
    """Return the named size, with the user's changes.

    Raises:
        ValueError: For a height or width that the network cannot have, or a window that does not fit the chunks.
    """
    size = SIZES[args.size]()
    scale = size.vae["scale_factor_spatial"]
    pixels = resolve_size(args.height, args.width, {}, (size.height, size.width), scale, size.patch_size)
    changes = {
        "height": pixels.latent_height,
        "width": pixels.latent_width,
        "num_inference_steps": args.steps,
        "num_chunks": args.chunks,
        "window_size": args.window_size,
        "sink_size": args.sink_size,
        "threads": args.threads,
    }
    size = replace(size, **{name: value for name, value in changes.items() if value is not None})
    check_window(size.window_size, size.sink_size, size.chunk_size, True)
    check_bench_size(size)
    return size


def log_stage(stage: str) -> None:
    """Progress goes to stderr, so that stdout is the table alone."""
    print(f"longlive bench: {stage} ...", file=sys.stderr, flush=True)
