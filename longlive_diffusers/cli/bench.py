"""`longlive bench`: how fast this device makes video, with every number saying what it counts."""

import argparse
from functools import partial

from ..limits import MAX_SIDE
from .arguments import (
    add_attention_backend_option,
    add_cache_options,
    add_compile_option,
    add_device_option,
    add_devices_option,
    add_nvfp4_option,
    add_renamed,
    add_shortcut_options,
    add_speed_option,
    integer,
)
from .choices import BENCH_DECODERS, BENCH_SIZES, DTYPES, MAX_CHUNKS, MAX_ROUNDS, MAX_STEPS, MAX_THREADS


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Measure speed and memory with random weights: nothing is downloaded. One video, batch 1, "
        "without guidance; text embeddings are random, so no text encoder runs. No LoRA is loaded: one that is fused, "
        "like that of the embedded model in generate, takes no time.",
    )
    parser.set_defaults(run=partial(run, parser))
    parser.add_argument(
        "--size", choices=BENCH_SIZES, default="toy", help="The sizes of the networks (default: %(default)s)."
    )
    parser.add_argument(
        "--height", type=integer(1, MAX_SIDE), help="The height of the video in pixels (default: the size's)."
    )
    parser.add_argument(
        "--width", type=integer(1, MAX_SIDE), help="The width of the video in pixels (default: the size's)."
    )
    parser.add_argument(
        "--steps", type=integer(1, MAX_STEPS), help="The number of solver steps of each chunk (default: 4)."
    )
    parser.add_argument(
        "--chunks", type=integer(1, MAX_CHUNKS), help="The length of the video in chunks (default: the size's)."
    )
    add_cache_options(parser)
    add_renamed(parser, "--kv-caches", "--kv-cache-dtype")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="The dtype of the networks (default: bfloat16 on a GPU, float32 on a CPU)."
    )
    add_device_option(parser)
    add_devices_option(parser)
    add_attention_backend_option(parser)
    add_nvfp4_option(parser)
    add_compile_option(parser)
    add_speed_option(parser, default="exact")
    add_shortcut_options(parser)
    parser.add_argument(
        "--decoder", choices=BENCH_DECODERS, default="vae", help="What makes the frames (default: %(default)s)."
    )
    parser.add_argument(
        "--threads", type=integer(1, MAX_THREADS), help="Threads of the CPU (default: the size's, or torch's)."
    )
    parser.add_argument("--json", metavar="FILE", help="Also write the numbers to this file.")
    parser.add_argument(
        "--results",
        metavar="FOLDER",
        help="Also write numbers and table to new files in this folder, DATE_SIZE_DEVICE_SETTING.json and .md.",
    )
    parser.add_argument(
        "--compare",
        metavar="OPTIONS",
        help="Measure two settings in turns, this one and the same with these options changed, and print the ratio of "
        'their times with its spread: --compare "--dtype bfloat16". All options can be compared that one process can '
        'change; --compare "" compares the setting with itself, which shows how far ratios stray. The networks of '
        "both are in memory.",
    )
    parser.add_argument(
        "--rounds",
        type=integer(2, MAX_ROUNDS),
        help="With --compare, how often each setting is measured (default: 4).",
    )


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Measure, and print the report."""
    from .run_bench import bench

    return bench(parser, args)
