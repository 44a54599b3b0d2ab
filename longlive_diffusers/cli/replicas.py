"""`longlive serve --ray`: how many replicas were asked for, checked before Ray starts or is even imported."""

import argparse
import os

import torch

from ..serve.replicas import Replicas
from .device import available_devices
from .launched import own_rank


def check_replica_options(args: argparse.Namespace) -> None:
    """
    Check `--ray`, `--replicas` and `--max-replicas`, as far as they can be without a device.

    Raises:
        ValueError: For options that contradict each other.
    """
    for option, value in (("--replicas", args.replicas), ("--max-replicas", args.max_replicas)):
        if value is not None and not args.ray:
            raise ValueError(f"{option} is for --ray, which starts replicas")
    if not args.ray:
        return
    if args.replicas is not None and args.max_replicas is not None:
        raise ValueError("give either --replicas or --max-replicas, not both")
    if args.devices > 1:
        raise ValueError(
            f"--devices {args.devices} and --ray exclude each other: a replica makes its streams on one device"
        )
    if own_rank().count > 1:
        raise ValueError("--ray starts its processes by itself: run longlive serve without torchrun")


def replicas_on(device: torch.device, args: argparse.Namespace) -> Replicas:
    """
    Return how many replicas are asked for, with a GPU each if `device` is one.

    Raises:
        ValueError: If a single device was named, or one of a kind that Ray does not know as a GPU.
    """
    if device.index is not None:
        raise ValueError(f"--device {device} is one device, and Ray gives each replica its own: say {device.type}")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--ray is for replicas on cuda or cpu, not on {device.type}")
    least = args.replicas or 1
    return Replicas(least, args.max_replicas or least, num_gpus=1 if device.type == "cuda" else 0)


def replicas_here(device: torch.device, args: argparse.Namespace) -> Replicas:
    """
    Return how many replicas are asked for on this machine; on a CPU, they divide its cores.

    Raises:
        ValueError: As [`replicas_on`] does, and if there are not so many GPUs.
    """
    replicas = replicas_on(device, args)
    there = available_devices().get(device.type, 0)
    if replicas.num_gpus and replicas.most > there:
        raise ValueError(f"{replicas} need a GPU each, but there are only {there} here")
    num_cpus = 1 if replicas.num_gpus else max(1, (os.cpu_count() or 1) // replicas.most)
    return Replicas(replicas.least, replicas.most, replicas.num_gpus, num_cpus)
