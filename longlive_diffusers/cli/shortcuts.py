"""What chunks are made with: shortcuts, as asked for by `--clean-pass`, `--attention-density` and `--speed`, and what
keys and values are stored as."""

import argparse
from typing import Any

import torch

from ..pipelines.speed import arguments_of, kv_cache_dtype_of


def shortcuts(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the arguments for `LongLivePipeline.stream`: what was asked for, or what `--speed` chooses for a
    device."""
    asked = {"clean_pass": args.clean_pass, "attention_density": args.attention_density}
    return arguments_of(args.speed, device) | {name: value for name, value in asked.items() if value is not None}


def kv_cache_dtype(args: argparse.Namespace, device: torch.device, head_dim: int) -> str | None:
    """Return what keys and values are stored as: what `--kv-cache-dtype` says, or what `--speed` chooses for heads of
    this size; None for the network's dtype."""
    if args.kv_cache_dtype != "auto":
        return args.kv_cache_dtype
    return kv_cache_dtype_of(args.speed, device, head_dim, args.attention_backend)
