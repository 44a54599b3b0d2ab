"""Turn an original checkpoint into a pipeline folder that `DiffusionPipeline.from_pretrained` opens.

A LongLive checkpoint holds the transformer alone. The tokenizer, the text encoder and the VAE are Wan2.2's own, and
come from a base: `Wan-AI/Wan2.2-TI2V-5B-Diffusers`, or a LongLive pipeline. The base's transformer weights, 10 GB or
more, are neither downloaded nor read; its transformer's config.json is, if it is there, for the width of the heads.

Nothing is written before everything has been checked, and the folder appears under its name only when it is complete.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, UMT5EncoderModel

from ..dtypes import DTYPES
from ..loaders.lora import check_lora_fits
from ..loaders.original import (
    Checkpoint,
    infer_transformer_config,
    load_original_transformer,
    read_original_state_dict,
)
from ..models.kv_cache import check_window
from ..models.transformer_longlive import LongLiveTransformer3DModel, check_config
from ..nvfp4.format import NVFP4Tensor
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..schedulers.scheduling_longlive import LongLiveScheduler
from ..setting_types import check_setting_types
from ..user_path import user_path
from .cards import origin_details
from .complete_folder import check_complete
from .config_file import read_config
from .output_folder import prepare_output, save_atomically
from .pipeline_folder import components_of, default_settings, find_folder, fuse_lora, settings_of, stored_dtype


logger = logging.get_logger(__name__)

_BASES = ("LongLivePipeline", "WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
_BASE_COMPONENTS = {"tokenizer": None, "text_encoder": "UMT5EncoderModel", "vae": "AutoencoderKLWan"}
_BASE_SETTINGS = ("README.md", "model_index.json", "*/config.json", "scheduler/*", "tokenizer/*")
_BASE_WEIGHTS = ("text_encoder/*", "vae/*")
# The settings that shapes do not reveal, but the base's transformer may.
_TRANSFORMER_SETTINGS = ("attention_head_dim", "chunk_size", "eps", "qk_norm", "sample_height", "sample_width")


def convert_checkpoint(
    checkpoint: Checkpoint,
    base: str | os.PathLike,
    output: str | os.PathLike,
    *,
    lora: str | os.PathLike | Mapping[str, Any] | None = None,
    use_ema: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    report: Callable[[str], None] = logger.info,
    **pipeline_config: Any,
) -> Path:
    """Write a complete LongLive pipeline made from an original checkpoint.

    Args:
        checkpoint: The transformer: the path of a `.pt`/`.pth`/`.safetensors` file, or a state dict.
        base: The folder or Hub repository of a Wan or LongLive pipeline, which provides tokenizer, text encoder and
            VAE. A LongLive base also provides its scheduler and the pipeline's settings.
        output: The folder to write; it must not exist, or be empty.
        lora: A LoRA (the reference's or a diffusers file) to add to the transformer for good.
        use_ema: Whether to take the checkpoint's averaged weights.
        dtype: The dtype of the transformer and the text encoder: float32, bfloat16 or float16. In both, the modules
            that their classes keep in float32 stay in float32. The VAE stays as the base stores it: it is small, and
            sensitive.
        report: Called with a line of text for every stage; `print`, for instance.
        **pipeline_config: Settings of `LongLivePipeline` (`window_size`, ...) or of the transformer (`chunk_size`,
            `attention_head_dim`, ...).

    Returns:
        The path of the folder.

    Raises:
        ValueError: If anything about the checkpoint, base, LoRA, settings or output is wrong; nothing has been written
            then.
    """
    started = time.monotonic()
    destination = prepare_output(output)
    output = user_path(output)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype has to be one of {', '.join(DTYPES)}, not {dtype}.")

    # 1. Check names, sizes and settings; only small files of the base are needed.
    weights = read_original_state_dict(checkpoint, use_ema=use_ema)
    lora_to_fuse = None
    if lora is not None:
        lora_to_fuse, lora_settings = LongLivePipeline.lora_state_dict(lora, return_lora_metadata=True)
        check_lora_fits(lora_to_fuse, weights)
    folder = _base_folder(base, _BASE_SETTINGS)
    index = _read_index(folder, base)
    from_longlive = index["_class_name"] == LongLivePipeline.__name__
    transformer_config, settings = _split_settings(pipeline_config)
    transformer_config = _base_transformer_config(folder, base) | transformer_config
    if from_longlive:
        settings = {name: index[name] for name in default_settings(LongLivePipeline) if name in index} | settings
    with settings_of(base):  # those given by the caller were checked before
        check_setting_types(settings, LongLivePipeline)
        check_setting_types(transformer_config, LongLiveTransformer3DModel)
    sizes = infer_transformer_config(weights, **transformer_config)
    check_config(FrozenDict({**default_settings(LongLiveTransformer3DModel), **sizes}))
    _check_window({**default_settings(LongLivePipeline), **settings}, sizes)
    _check_base(folder, index, sizes, base, from_longlive)

    # 2. Load. A LoRA is added before rounding to `dtype`, not after.
    packed = any(isinstance(weight, NVFP4Tensor) for weight in weights.values())
    first_dtype = dtype if lora_to_fuse is None or packed else torch.float32
    transformer = load_original_transformer(
        weights, LongLiveTransformer3DModel, torch_dtype=first_dtype, **transformer_config
    )
    del weights
    report(f"transformer: {_describe(transformer)}, {sizes['num_layers']} layers, {time.monotonic() - started:.0f} s")
    folder = _base_folder(base, (*_BASE_SETTINGS, *_BASE_WEIGHTS))
    check_complete(folder, {name: index[name] for name in _BASE_COMPONENTS}, base)
    components = _load_components(folder, base, dtype, from_longlive)
    report(f"text encoder: {_describe(components['text_encoder'])}; VAE: {_describe(components['vae'])}")
    pipeline = LongLivePipeline(transformer=transformer, **components, **settings)
    if lora_to_fuse is not None:
        LongLivePipeline.load_lora_into_transformer(
            lora_to_fuse, transformer=pipeline.transformer, metadata=lora_settings
        )
        fuse_lora(pipeline)
        if not packed:  # NVFP4 weights were rounded when they were fused
            fused = pipeline.transformer.state_dict()
            pipeline.transformer = load_original_transformer(
                fused, LongLiveTransformer3DModel, torch_dtype=dtype, **transformer_config
            )
        report(f"LoRA: fused, {time.monotonic() - started:.0f} s")

    # 3. Write.
    name = None if isinstance(checkpoint, Mapping) else Path(checkpoint).name
    save_atomically(pipeline, destination, _card(pipeline, destination.name, name, base))
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    report(f"{output}: {size / 2**30:.2f} GiB, {time.monotonic() - started:.0f} s in all")
    return output


def _base_folder(base: str | os.PathLike, patterns: tuple[str, ...]) -> Path:
    return find_folder(base, patterns, ignore_patterns=("*.bin", "*.msgpack"))


def _read_index(folder: Path, base: str | os.PathLike) -> dict[str, Any]:
    index = read_config(folder, "model_index.json", base)
    for name, needed in _BASE_COMPONENTS.items():
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found is None or (needed is not None and found != needed):
            raise ValueError(
                f"The base {base} ({index.get('_class_name')}) has {found} as {name}, not {needed or 'one'}."
            )
    if index.get("_class_name") not in _BASES:
        raise ValueError(
            f"The base {base} is a {index.get('_class_name', 'pipeline without a name')}; it has to be one of "
            f"{', '.join(_BASES)}, which have the text encoder and the VAE of the checkpoint."
        )
    return index


def _split_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split settings into those of the transformer and those of the pipeline."""
    of_pipeline, of_transformer = default_settings(LongLivePipeline), default_settings(LongLiveTransformer3DModel)
    if unknown := sorted(set(config) - set(of_pipeline) - set(of_transformer)):
        raise ValueError(
            f"There is no setting {', '.join(unknown)}. The pipeline has {', '.join(sorted(of_pipeline))}; "
            f"the transformer has {', '.join(sorted(of_transformer))}."
        )
    check_setting_types(config, LongLivePipeline)
    check_setting_types(config, LongLiveTransformer3DModel)
    return (
        {name: value for name, value in config.items() if name not in of_pipeline},
        {name: value for name, value in config.items() if name in of_pipeline},
    )


def _base_transformer_config(folder: Path, base: str | os.PathLike) -> dict[str, Any]:
    name = "transformer/config.json"
    config = read_config(folder, name, base) if (folder / name).is_file() else {}
    return {key: config[key] for key in _TRANSFORMER_SETTINGS if key in config}


def _check_window(settings: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    chunk_size = sizes.get("chunk_size", default_settings(LongLiveTransformer3DModel)["chunk_size"])
    check_window(settings["window_size"], settings["sink_size"], chunk_size, settings["multi_shot_sink"])


def _check_base(
    folder: Path, index: Mapping[str, Any], sizes: Mapping[str, Any], base: str | os.PathLike, from_longlive: bool
) -> None:
    """Check the base's small files: that they are there, of the right types, and of the checkpoint's sizes."""
    if user_path(base).is_dir():  # the weights of one on the Hub are downloaded later
        check_complete(folder, {name: index[name] for name in _BASE_COMPONENTS}, base)
    vae, text_encoder = (read_config(folder, f"{name}/config.json", base) for name in ("vae", "text_encoder"))
    with settings_of(base):
        check_setting_types(vae, AutoencoderKLWan)
        if from_longlive:
            scheduler = read_config(folder, "scheduler/scheduler_config.json", base)
            check_setting_types(scheduler, LongLiveScheduler)
    if vae.get("z_dim") != sizes["in_channels"]:
        raise ValueError(
            f"The base's VAE has {vae.get('z_dim')} latent channels, the checkpoint {sizes['in_channels']}: {base}"
        )
    if (width := text_encoder.get("d_model")) != sizes["text_dim"]:
        raise ValueError(
            f"The base's text encoder is {width!r} wide, the checkpoint takes {sizes['text_dim']}: {base}"
        )


def _load_components(folder: Path, base: str | os.PathLike, dtype: torch.dtype, from_longlive: bool) -> dict[str, Any]:
    with components_of(base):
        return {
            "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
            "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype),
            "vae": AutoencoderKLWan.from_pretrained(folder / "vae", dtype=stored_dtype(folder / "vae")),
            # Wan's own scheduler has another grid of steps, so only a LongLive base's settings mean anything here.
            "scheduler": LongLiveScheduler.from_pretrained(folder / "scheduler")
            if from_longlive
            else LongLiveScheduler(),
        }


def _card(pipeline: LongLivePipeline, name: str, checkpoint: str | None, base: str | os.PathLike) -> ModelCard:
    """Make the card of a converted pipeline. The base gave the small parts, the checkpoint the transformer, whose
    license is its own: the base's must not stand for all."""
    origin = origin_details(base)
    repo = origin["base_model"]
    gave = "a base" if repo is None else f"[{repo}](https://huggingface.co/{repo})"
    license = f", whose license is `{origin['license']}`" if "license" in origin else ""
    file = "a checkpoint" if checkpoint is None else f"`{checkpoint}`"
    return pipeline.model_card(
        name,
        origin=f"The transformer was converted from {file}, whose license it keeps. The tokenizer, the text encoder "
        f"and the VAE come from {gave}{license}.",
    )


def _describe(model: torch.nn.Module) -> str:
    parameters = list(model.parameters())
    size = sum(parameter.nbytes for parameter in parameters) / 2**30
    return f"{sum(parameter.numel() for parameter in parameters) / 1e9:.2f} B parameters, {size:.2f} GiB"
