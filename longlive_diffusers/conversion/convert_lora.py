"""Turn a LoRA of any layout into a file that the reference implementation loads."""

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..atomic_write import check_new_file, new_file
from ..loaders.checkpoint_file import check_finite
from ..loaders.lora_export import original_lora_state_dict
from ..pipelines.pipeline_longlive import LongLivePipeline


logger = logging.get_logger(__name__)

_SUFFIXES = (".pt", ".pth")  # the reference opens LoRAs with torch.load


def convert_lora(
    lora: str | os.PathLike | Mapping[str, Any],
    output: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    report: Callable[[str], None] = logger.info,
) -> Path:
    """
    Write a LoRA in the reference's layout, see `original_lora_state_dict`.

    Args:
        lora: The LoRA: a file, folder or Hub repository of any layout that `load_lora_weights` takes, or a dictionary.
        output: The file to write, a `.pt` or `.pth` that does not exist yet.
        dtype: The dtype of the weights; None for the stored one.
        report: Called with a line of text at the end; `print`, for instance.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the LoRA cannot be read or has no counterpart in the reference's network, or the output cannot
            be written; nothing has been written then.
    """
    path = check_new_file(output)
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"The output '{output}' has to be a {' or '.join(_SUFFIXES)} file, which the reference opens."
        )
    if path.exists():
        raise ValueError(f"The output '{output}' is there already; give the name of a new file.")
    state, metadata = LongLivePipeline.lora_state_dict(lora, return_lora_metadata=True)
    content = original_lora_state_dict(state, metadata)
    layers = content["generator_lora"]
    for name, tensor in layers.items():
        # A copy, because a view would be saved with all that it is a view of.
        layers[name] = tensor.detach().to("cpu", dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)
        check_finite(layers[name], name)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with new_file(path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())
    rank = next(tensor.shape[0] for name, tensor in layers.items() if ".lora_A." in name)
    dtypes = " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in layers.values()}))
    report(f"{path}: a LoRA of {len(layers) // 2} layers, rank {rank}, {dtypes}")
    return path
