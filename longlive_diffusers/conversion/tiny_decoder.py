"""Tiny decoders on disk: found and loaded, and made of the published weights of TAEHV."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging

from ..atomic_write import new_folder
from ..models.tiny_decoder import TinyVideoDecoder, check_config
from ..user_path import user_path
from .config_file import read_config
from .output_folder import prepare_output
from .pipeline_folder import components_of, default_settings, find_folder, settings_of, stored_dtype


logger = logging.get_logger(__name__)

_FILES = ("config.json", "*.safetensors")


def load_tiny_decoder(source: str | os.PathLike) -> TinyVideoDecoder:
    """
    Load a tiny decoder on the CPU, in the dtype that it is stored in.

    Args:
        source: A folder or a Hub repository that `TinyVideoDecoder.save_pretrained` wrote, or a file of TAEHV
            (`taew2_2.pth`, `taew2_2.safetensors`).

    Raises:
        ValueError: If there is none, or it is of another model, incomplete or damaged.
    """
    if user_path(source).is_file():
        return TinyVideoDecoder.from_original(user_path(source))
    folder = find_folder(source, _FILES)
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{source}' holds no tiny decoder: there is no config.json in it.")
    config = read_config(folder, "config.json", source)
    name = config.get("_class_name")
    if name != TinyVideoDecoder.__name__:
        raise ValueError(f"'{source}' is a {name or 'model without a name'}, not a {TinyVideoDecoder.__name__}.")
    with settings_of(source), components_of(source):
        # First: an error in a constructor makes diffusers leave torch's default dtype as it set it for the weights.
        check_config({name: config.get(name, value) for name, value in default_settings(TinyVideoDecoder).items()})
        return TinyVideoDecoder.from_pretrained(folder, torch_dtype=stored_dtype(folder))


def convert_tiny_decoder(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    report: Callable[[str], None] = logger.info,
) -> Path:
    """
    Write the decoder of a file of TAEHV as a folder that `TinyVideoDecoder.from_pretrained` opens.

    Args:
        checkpoint: The file, `taew2_2.pth` or `.safetensors`; its encoder is left out.
        output: The folder to write; it must not exist, or be empty.
        dtype: The dtype of the weights; None for the stored one.
        report: Called with a line of text at the end; `print`, for instance.

    Returns:
        The path of the folder.

    Raises:
        ValueError: If the file cannot be read or is of another kind, or the output cannot be written; nothing has been
            written then.
        OSError: If the disk has no room for it, or fails; nothing is left of it then.
    """
    destination = prepare_output(output)
    decoder = TinyVideoDecoder.from_original(checkpoint, torch_dtype=dtype)
    with new_folder(destination) as unfinished:
        decoder.save_pretrained(unfinished)
    config, size = decoder.config, sum(parameter.numel() for parameter in decoder.parameters())
    report(
        f"{output}: a decoder of {size / 1e6:.2f} M parameters for latents of {config['latent_channels']} channels, "
        f"{decoder.spatial_scale}x{decoder.spatial_scale} pixels and {decoder.temporal_scale} frames each"
    )
    return user_path(output)
