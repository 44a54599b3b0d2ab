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
from diffusers.utils import logging
from safetensors import SafetensorError
from transformers import AutoTokenizer, UMT5EncoderModel

from ..dtypes import DTYPES
from ..loaders.checkpoint_file import read_checkpoint_file
from ..loaders.lora import LORA_SUFFIXES, check_lora_fits, is_original_lora, read_original_lora
from ..loaders.original import (
    Checkpoint,
    infer_transformer_config,
    load_original_transformer,
    read_original_state_dict,
)
from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..nvfp4.format import NVFP4Tensor, Weight
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..schedulers.scheduling_longlive import LongLiveScheduler
from .pipeline_folder import (
    check_output,
    default_settings,
    find_folder,
    fuse_lora,
    read_json,
    save_atomically,
    stored_dtype,
)


logger = logging.get_logger(__name__)

_BASE_COMPONENTS = {"tokenizer": None, "text_encoder": "UMT5EncoderModel", "vae": "AutoencoderKLWan"}
_BASE_SETTINGS = ("model_index.json", "*/config.json", "scheduler/*", "tokenizer/*")
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
    output = Path(output)
    check_output(output)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype has to be one of {', '.join(DTYPES)}, not {dtype}.")

    # 1. Check names, sizes and settings; only small files of the base are needed.
    weights = read_original_state_dict(checkpoint, use_ema=use_ema)
    lora_to_fuse = None if lora is None else _read_lora(lora, weights)
    folder = _base_folder(base, _BASE_SETTINGS)
    index = _read_index(folder, base)
    from_longlive = index["_class_name"] == LongLivePipeline.__name__
    transformer_config, settings = _split_settings(pipeline_config)
    transformer_config = _base_transformer_config(folder, base) | transformer_config
    if from_longlive:
        settings = {name: index[name] for name in default_settings(LongLivePipeline) if name in index} | settings
    sizes = infer_transformer_config(weights, **transformer_config)
    _check_sizes(folder, sizes, base)

    # 2. Load. A LoRA is added before rounding to `dtype`, not after.
    packed = any(isinstance(weight, NVFP4Tensor) for weight in weights.values())
    first_dtype = dtype if lora_to_fuse is None or packed else torch.float32
    transformer = load_original_transformer(
        weights, LongLiveTransformer3DModel, torch_dtype=first_dtype, **transformer_config
    )
    del weights
    report(f"transformer: {_describe(transformer)}, {sizes['num_layers']} layers, {time.monotonic() - started:.0f} s")
    components = _load_components(_base_folder(base, (*_BASE_SETTINGS, *_BASE_WEIGHTS)), base, dtype, from_longlive)
    report(f"text encoder: {_describe(components['text_encoder'])}; VAE: {_describe(components['vae'])}")
    pipeline = LongLivePipeline(transformer=transformer, **components, **settings)
    if lora_to_fuse is not None:
        pipeline.load_lora_weights(lora_to_fuse)
        fuse_lora(pipeline)
        if not packed:  # NVFP4 weights were rounded when they were fused
            fused = pipeline.transformer.state_dict()
            pipeline.transformer = load_original_transformer(
                fused, LongLiveTransformer3DModel, torch_dtype=dtype, **transformer_config
            )
        report(f"LoRA: fused, {time.monotonic() - started:.0f} s")

    # 3. Write.
    save_atomically(pipeline, output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    report(f"{output}: {size / 2**30:.2f} GiB, {time.monotonic() - started:.0f} s in all")
    return output


def _read_lora(lora: str | os.PathLike | Mapping[str, Any], weights: Mapping[str, Weight]) -> dict | str:
    """Return what to pass to `load_lora_weights`: the reference's LoRA converted, any other file or repo as it is."""
    if isinstance(lora, Mapping) or is_original_lora(lora):
        lora = read_original_lora(lora)
        check_lora_fits(lora, weights)
        return lora
    path = Path(lora)
    if path.suffix in LORA_SUFFIXES and not path.exists():
        raise ValueError(f"There is no LoRA file {path}.")
    if path.is_file():
        content = {key: value for key, value in read_checkpoint_file(path).items() if isinstance(value, torch.Tensor)}
        if not any("lora" in key for key in content):
            raise ValueError(f"{path} is not a LoRA: none of its {len(content)} tensors is of a LoRA layer.")
        check_lora_fits({key: tensor for key, tensor in content.items() if key.startswith("transformer.")}, weights)
    return str(lora)


def _base_folder(base: str | os.PathLike, patterns: tuple[str, ...]) -> Path:
    return find_folder(base, patterns, ignore_patterns=("*.bin", "*.msgpack"))


def _read_index(folder: Path, base: str | os.PathLike) -> dict[str, Any]:
    index = read_json(folder, "model_index.json", base)
    for name, needed in _BASE_COMPONENTS.items():
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found is None or (needed is not None and found != needed):
            raise ValueError(
                f"The base {base} ({index.get('_class_name')}) has {found} as {name}, not {needed or 'one'}."
            )
    if "_class_name" not in index:
        raise ValueError(f"The base {base} has a model_index.json that does not name its pipeline.")
    return index


def _split_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split settings into those of the transformer and those of the pipeline."""
    of_pipeline, of_transformer = default_settings(LongLivePipeline), default_settings(LongLiveTransformer3DModel)
    if unknown := sorted(set(config) - set(of_pipeline) - set(of_transformer)):
        raise ValueError(
            f"There is no setting {', '.join(unknown)}. The pipeline has {', '.join(sorted(of_pipeline))}; "
            f"the transformer has {', '.join(sorted(of_transformer))}."
        )
    return (
        {name: value for name, value in config.items() if name not in of_pipeline},
        {name: value for name, value in config.items() if name in of_pipeline},
    )


def _base_transformer_config(folder: Path, base: str | os.PathLike) -> dict[str, Any]:
    name = "transformer/config.json"
    config = read_json(folder, name, base) if (folder / name).is_file() else {}
    return {key: config[key] for key in _TRANSFORMER_SETTINGS if key in config}


def _check_sizes(folder: Path, sizes: Mapping[str, Any], base: str | os.PathLike) -> None:
    channels = read_json(folder, "vae/config.json", base).get("z_dim")
    if channels != sizes["in_channels"]:
        raise ValueError(
            f"The base's VAE has {channels} latent channels, the checkpoint {sizes['in_channels']}: {base}"
        )
    width = read_json(folder, "text_encoder/config.json", base).get("d_model")
    if width != sizes["text_dim"]:
        raise ValueError(f"The base's text encoder is {width} wide, the checkpoint takes {sizes['text_dim']}: {base}")


def _load_components(folder: Path, base: str | os.PathLike, dtype: torch.dtype, from_longlive: bool) -> dict[str, Any]:
    try:
        return {
            "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
            "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype),
            "vae": AutoencoderKLWan.from_pretrained(folder / "vae", dtype=stored_dtype(folder / "vae")),
            # Wan's own scheduler has another grid of steps, so only a LongLive base's settings mean anything here.
            "scheduler": LongLiveScheduler.from_pretrained(folder / "scheduler")
            if from_longlive
            else LongLiveScheduler(),
        }
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"A component of the base {base} cannot be loaded: {error}") from error


def _describe(model: torch.nn.Module) -> str:
    parameters = list(model.parameters())
    size = sum(parameter.nbytes for parameter in parameters) / 2**30
    return f"{sum(parameter.numel() for parameter in parameters) / 1e9:.2f} B parameters, {size:.2f} GiB"
