"""The models that a command was asked to use, checked before anything large is loaded."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..assets import toy_pipeline_path
from ..conversion.pipeline_folder import PipelineFolder, check_lora_file
from ..models.kv_cache import check_window
from ..models.layer_kv_cache import resolve_kv_cache_dtype
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..pipelines.speed import CHANGE_WEIGHTS
from .backends import check_attention_backend, check_nvfp4_backend, notes_on_speed
from .device import choose_device
from .devices import check_devices, device_of, prepare, share
from .launched import Rank


@dataclass(frozen=True)
class ModelRequest:
    """
    Args:
        folder: The pipeline.
        device: The device that it runs on.
        loras: The LoRAs to load, each with its scale.
        num_devices: How many devices make a video together.
        notes: What the user should know about it, a line each.
    """

    folder: PipelineFolder
    device: torch.device
    loras: list[tuple[str, float]]
    num_devices: int
    notes: list[str]


def check_model(args: argparse.Namespace) -> ModelRequest:
    """
    Check the options of `add_model_options` and `add_cache_options`.

    Raises:
        ValueError: For options that contradict each other, models that are not there, and what this device, or this
            model, cannot do.
    """
    device, loras = choose_device(args.device), scaled_loras(args)
    for lora, _ in loras:
        check_lora_file(lora)
    folder = PipelineFolder.find(toy_pipeline_path() if args.model is None else args.model)
    num_devices = check_devices(args.devices, device, folder.transformer["num_attention_heads"])
    sizes, settings = folder.sizes, folder.settings
    check_window(
        settings["window_size"] if args.window_size is None else args.window_size,
        settings["sink_size"] if args.sink_size is None else args.sink_size,
        sizes.chunk_size,
        settings["multi_shot_sink"],
    )
    if args.kv_cache_dtype != "auto":
        resolve_kv_cache_dtype(args.kv_cache_dtype, sizes.head_dim)
    if args.attention_backend:
        check_attention_backend(args.attention_backend, device)
    if args.speed in CHANGE_WEIGHTS and loras and (args.nvfp4 or folder.transformer.get("quantization_config")):
        raise ValueError(
            f"--speed {args.speed} adds the LoRA to the weights, and those in NVFP4 would be rounded again: add it "
            "before they are quantized, or give --speed exact"
        )
    if args.nvfp4:
        check_nvfp4_backend("--nvfp4", args.nvfp4, folder.transformer, device)
    return ModelRequest(folder, device, loras, num_devices, notes_on_speed(device, args.dtype, args.nvfp4))


def load_model(
    models: ModelRequest,
    args: argparse.Namespace,
    rank: Rank,
    *,
    fused_lora: Path | None,
    offload: str = "none",
    show_progress: bool,
    announces: bool,
) -> LongLivePipeline:
    """Load the models that were asked for, on this process's device.

    Args:
        models, args: What was asked for.
        rank: This process's place among those that share the work.
        fused_lora: A LoRA to add for good.
        offload: What is kept on the GPU only while it is needed, as `PipelineFolder.load` takes it.
        show_progress: Whether to show progress bars.
        announces: Whether to say what `--speed` has changed.
    """
    device = device_of(rank, models.device)
    prepare(rank, device)
    pipe = models.folder.load(
        device=device,
        dtype=args.dtype,
        offload=offload,
        loras=models.loras,
        fused_lora=fused_lora,
        nvfp4_backend=args.nvfp4,
        attention_backend=args.attention_backend,
        compile=args.compile,
        fuse_loras=args.speed in CHANGE_WEIGHTS,
        show_progress=show_progress,
    )
    if args.speed is not None:
        plan = pipe.optimize(args.speed)
        if announces:
            print(f"longlive: {plan}", file=sys.stderr)
    share(pipe, rank, device)
    return pipe


def scaled_loras(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Return the LoRAs to load, each with its scale.

    Raises:
        ValueError: If the scales are neither none, nor one for all, nor one for each, or no LoRA is to be used.
    """
    scales = args.lora_scale or [1.0]
    if args.lora and args.no_lora:
        raise ValueError("give either --lora or --no-lora, not both")
    if args.lora_scale and not args.lora:
        raise ValueError("--lora-scale needs a --lora")
    if len(scales) not in (1, len(args.lora)):
        raise ValueError(
            f"there are {len(scales)} --lora-scale for {len(args.lora)} --lora; give one for all, or one for each"
        )
    return list(zip(args.lora, scales * len(args.lora) if len(scales) == 1 else scales, strict=True))
