"""Measure what `longlive bench` was asked for, and report whatever was measured, also if a part fails."""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial

import torch

from ..atomic_write import check_new_file, write_text
from ..benchmark.report import BenchOptions, describe_setting, measurements
from ..benchmark.sizes import SIZES, BenchSize, check_bench_size
from ..benchmark.table import as_table
from ..dtypes import DTYPES
from ..models.kv_cache import check_window
from ..pipelines.inputs import resolve_size
from .backends import check_attention_backend, check_nvfp4_backend
from .device import choose_device
from .devices import check_devices, device_of, prepare, share, start_ranks
from .launched import own_rank


def bench(args: argparse.Namespace) -> int:
    """Measure, and print the report."""
    options, rank = requested_options(args), own_rank()
    json_file = None if args.json is None else check_new_file(args.json)
    if rank.count < args.devices:
        return start_ranks(args.argv, args.devices)
    prepare(rank, options.device)
    if options.size.threads is not None:
        torch.set_num_threads(options.size.threads)
    report = {"setting": describe_setting(options), "results": {}}
    try:
        share_it = partial(share, rank=rank, device=options.device)
        for results in measurements(options, log_stage if rank.leads else lambda stage: None, share_it):
            report["results"].update(results)
    finally:  # what was measured before an error or Ctrl-C took time, too
        if report["results"] and rank.leads:
            if json_file is not None:
                write_text(json_file, json.dumps(report, indent=2) + "\n")
            print(as_table(report))
    return 0


def requested_options(args: argparse.Namespace) -> BenchOptions:
    """Return what is to be measured.

    Raises:
        ValueError: For anything that cannot be measured here.
    """
    size = requested_size(args)
    if len(set(args.kv_cache_dtype)) < len(args.kv_cache_dtype):
        raise ValueError(f"--kv-cache-dtype names one twice: {' '.join(args.kv_cache_dtype)}")
    device = choose_device(args.device)
    num_devices = check_devices(args.devices, device, size.transformer["num_attention_heads"])
    if args.attention_backend:
        check_attention_backend(args.attention_backend, device)
    if args.nvfp4:
        check_nvfp4_backend("--nvfp4", args.nvfp4, size.transformer, device)
    return BenchOptions(
        size_name=args.size,
        size=size,
        device=device_of(own_rank(), device),
        num_devices=num_devices,
        dtype=DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")],
        attention_backend=args.attention_backend,
        nvfp4_backend=args.nvfp4,
        compile=args.compile,
        kv_cache_dtypes=tuple(args.kv_cache_dtype),
    )


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
    check_bench_size(size, compares_caches=bool(args.kv_cache_dtype))
    return size


def log_stage(stage: str) -> None:
    """Progress goes to stderr, so that stdout is the table alone."""
    print(f"longlive bench: {stage} ...", file=sys.stderr, flush=True)
