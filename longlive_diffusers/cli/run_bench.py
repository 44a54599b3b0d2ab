"""Measure what `longlive bench` was asked for, and report whatever was measured, also if a part fails."""

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..atomic_write import check_new_file, write_text
from ..benchmark.compare import compare
from ..benchmark.options import BenchOptions, describe_setting
from ..benchmark.report import LogStage, measurements
from ..benchmark.result_files import as_json, check_results_folder, write_results
from ..benchmark.sizes import SIZES, BenchSize, check_bench_size
from ..benchmark.table import as_table
from ..dtypes import DTYPES, dtype_name
from ..models.kv_cache import check_window
from ..models.layer_kv_cache import resolve_kv_cache_dtype
from ..pipelines.inputs import resolve_size
from .arguments import with_values_joined
from .backends import check_attention_backend, check_nvfp4_backend
from .console import flush
from .device import choose_device
from .devices import check_devices, device_of, prepare, share, start_ranks
from .errors import one_line
from .launched import own_rank
from .shortcuts import kv_cache_dtype, shortcuts


ROUNDS = 4  # of a comparison
# What one process cannot change from one moment to the next, and what is of the whole command.
NOT_COMPARED = ("threads", "devices", "rounds", "compare", "json", "results")
NOT_IN_LABELS = ("size", "dtype", "device", "run", *NOT_COMPARED[2:])


def bench(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Measure, and print the report."""
    options, rank = requested_options(args), own_rank()
    if args.compare is None and args.rounds is not None:
        raise ValueError(f"--rounds {args.rounds} would do nothing without --compare")
    asked = [options]
    if args.compare is not None:
        asked.append(compared_options(compared_arguments(parser, args), args.compare, options))
    json_file = None if args.json is None else check_new_file(args.json)
    results_folder = None if args.results is None else check_results_folder(args.results)
    if rank.count < args.devices:
        return start_ranks(args.argv, args.devices)
    prepare(rank, options.device)
    if options.size.threads is not None:
        torch.set_num_threads(options.size.threads)
    report: dict[str, Any] = {
        "command": shlex.join(["longlive", *args.argv]),
        "labels": [label(parser, args, options), *([] if args.compare is None else [args.compare or "itself"])],
        "setting": describe_setting(options),
        "results": {},
    }
    if args.compare is not None:
        report["compared_setting"] = describe_setting(asked[1])
    stages = _stages(asked, args.rounds or ROUNDS, log_stage if rank.leads else lambda stage: None)
    try:
        for results in stages:
            report["results"].update(results)
    except BaseException:  # what was measured before an error or Ctrl-C took time, too
        if report["results"] and rank.leads:
            log_errors(tell(report, json_file, results_folder))
        raise
    errors = tell(report, json_file, results_folder) if rank.leads else []
    log_errors(errors[:-1])
    if errors:
        raise errors[-1]
    return 0


def tell(report: dict[str, Any], json_file: Path | None, results_folder: Path | None) -> list[OSError]:
    """Print the report, and write it to the files that were asked for.

    Returns:
        The errors of what could not be written; none of them keeps the rest from being written.
    """
    outputs: list[Callable[[], None]] = [lambda: print_now(as_table(report))]
    if json_file is not None:
        outputs.append(lambda: write_text(json_file, as_json(report)))
    if results_folder is not None:
        outputs.append(lambda: log(f"wrote {write_results(results_folder, report)}, and the table beside it"))
    errors = []
    for write in outputs:
        try:
            write()
        except OSError as error:
            errors.append(error)
    return errors


def _stages(asked: list[BenchOptions], rounds: int, log_stage: LogStage) -> Iterator[dict[str, Any]]:
    share_it = partial(share, rank=own_rank(), device=asked[0].device)
    if len(asked) == 1:
        return measurements(asked[0], log_stage, share_it)
    return compare(asked[0], asked[1], rounds, log_stage, share_it)


def compared_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with those changed that `--compare` names.

    Raises:
        ValueError: If it names one that cannot be compared, or there is no such argument or value.
    """
    try:
        words = shlex.split(args.compare)
    except ValueError as error:  # a quotation mark without another
        raise ValueError(f"--compare '{args.compare}': {error}") from error
    words = with_values_joined(words, ("--compare",))

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"--compare '{args.compare}': {message}")

    parser = copy.copy(parser)
    parser.error = refuse  # which would speak of the whole command
    changed = parser.parse_args(words, argparse.Namespace(**vars(args)))  # what is there already has no default
    for name in NOT_COMPARED:
        if vars(changed)[name] != vars(args)[name]:
            raise ValueError(f"--compare cannot change --{name}, which is the whole command's")
    return changed


def compared_options(args: argparse.Namespace, words: str, options: BenchOptions) -> BenchOptions:
    """Return the second of two settings.

    Raises:
        ValueError: For anything that cannot be measured here, or not in turns with the first.
    """
    try:
        other = requested_options(args)
    except ValueError as error:
        raise ValueError(f"--compare '{words}': {error}") from error
    if other.size.threads != options.size.threads:
        threads = " and ".join(str(each.size.threads or "torch's number of") for each in (options, other))
        raise ValueError(f"--compare '{words}' would change the number of threads ({threads}): give --threads")
    return other


def label(parser: argparse.ArgumentParser, args: argparse.Namespace, options: BenchOptions) -> str:
    """Return what tells a setting from others of its size and device: its dtype, and the options that were given."""
    words = [dtype_name(options.dtype)]
    for name, default in vars(parser.parse_args([])).items():
        value = vars(args)[name]
        if name not in NOT_IN_LABELS and value != default:
            words += [name.replace("_", "-")] + ([] if value is True else [str(value)])
    return " ".join(words)


def requested_options(args: argparse.Namespace) -> BenchOptions:
    """Return what is to be measured.

    Raises:
        ValueError: For anything that cannot be measured here.
    """
    size = requested_size(args)
    device = choose_device(args.device)
    num_devices = check_devices(args.devices, device, size.transformer["num_attention_heads"])
    if args.attention_backend:
        check_attention_backend(args.attention_backend, device)
    if args.nvfp4:
        check_nvfp4_backend("--nvfp4", args.nvfp4, size.transformer, device)
    head_dim = size.transformer["attention_head_dim"]
    if args.kv_cache_dtype != "auto":
        resolve_kv_cache_dtype(args.kv_cache_dtype, head_dim)
    return BenchOptions(
        size_name=args.size,
        size=size,
        device=device_of(own_rank(), device),
        num_devices=num_devices,
        dtype=DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")],
        attention_backend=args.attention_backend,
        nvfp4_backend=args.nvfp4,
        compile=args.compile,
        decoder=args.decoder,
        speed=args.speed,
        stream={"kv_cache_dtype": kv_cache_dtype(args, device, head_dim), **shortcuts(args, device)},
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
    check_bench_size(size)
    return size


def print_now(text: str) -> None:
    """Print a text, and raise an OSError at once where that cannot be done."""
    print(text)
    flush()


def log_errors(errors: list[OSError]) -> None:
    """Say what could not be written, where another error ends the command."""
    for error in errors:
        log(f"error: {one_line(error, None)}")


def log_stage(stage: str) -> None:
    """Say which stage begins."""
    log(f"{stage} ...")


def log(text: str) -> None:
    """Progress goes to stderr, so that stdout is the table alone."""
    print(f"longlive bench: {text}", file=sys.stderr, flush=True)
