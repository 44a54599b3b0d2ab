"""Shortcuts: what chunks are made with, as asked for by `--clean-pass`, `--attention-density` and `--speed`."""

import argparse
from typing import Any

from ..pipelines.speed import arguments_of


def shortcuts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments for `LongLivePipeline.stream`: what was asked for, or what `--speed` chooses."""
    asked = {"clean_pass": args.clean_pass, "attention_density": args.attention_density}
    return arguments_of(args.speed) | {name: value for name, value in asked.items() if value is not None}
