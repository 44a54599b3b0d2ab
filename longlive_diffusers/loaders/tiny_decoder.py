"""Load the published weights of TAEHV (https://github.com/madebyollin/taehv) as a [`TinyVideoDecoder`].

Its files (`taew2_2.pth` for the latents of Wan2.2's 5B model) hold a state dict of an encoder and a decoder, each a
sequence of layers that are named by their index. The widths, the number of latent channels and the size of the patch
show in the shapes; which stages double the frames does not, because a layer that makes two frames of one may stand
where only the second of them is wanted.

All names and shapes are checked against a model on the meta device before the first weight is allocated.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin

from .checkpoint_file import check_finite, named_tensors, read_checkpoint_file
from .names import first_names
from .original import check_against_model


Model = TypeVar("Model", bound=ModelMixin)

WAN_TIME_UPSCALE = (False, True, True)
# The layers of the decoder that have weights, by index; the others clamp, rectify or repeat pixels.
LAYERS = {
    1: "conv_in",
    3: "stages.0.blocks.0",
    4: "stages.0.blocks.1",
    5: "stages.0.blocks.2",
    7: "stages.0.time_conv",
    8: "stages.0.conv_out",
    9: "stages.1.blocks.0",
    10: "stages.1.blocks.1",
    11: "stages.1.blocks.2",
    13: "stages.1.time_conv",
    14: "stages.1.conv_out",
    15: "stages.2.blocks.0",
    16: "stages.2.blocks.1",
    17: "stages.2.blocks.2",
    19: "stages.2.time_conv",
    20: "stages.2.conv_out",
    22: "conv_out",
}
# The convolutions within a memory block, and that within a layer that makes frames.
PARTS = {"conv.0": "conv1", "conv.2": "conv2", "conv.4": "conv3", "conv": ""}
_ENCODER, _DECODER = "encoder.", "decoder."
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def load_original_tiny_decoder(
    checkpoint: str | os.PathLike | Mapping[str, Any],
    model_class: type[Model],
    *,
    torch_dtype: torch.dtype | None = None,
    time_upscale: tuple[bool, ...] = WAN_TIME_UPSCALE,
    **config: Any,
) -> Model:
    """
    Build a tiny decoder from a file of TAEHV.

    Args:
        checkpoint: The path of a `.pth` or `.safetensors` file, or its state dict. The encoder in it is left out.
        model_class: The class to build, `TinyVideoDecoder`.
        torch_dtype: The dtype of the weights; as stored by default.
        time_upscale: Whether each of the three stages doubles the frames. Of a layer that makes two frames of one in a
            stage that does not, what makes the second is kept.
        **config: Other settings of the model; those that shapes show have to agree with them.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ValueError: If the file cannot be read or is of another kind, if weights are missing, unexpected, of another
            shape or no floats, or if one has infinities or NaN.
    """
    if torch_dtype not in (None, *_FLOATS):
        raise ValueError(f"torch_dtype has to be one of {', '.join(map(str, _FLOATS))}, not {torch_dtype}.")
    source = "The given state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    content = dict(checkpoint) if isinstance(checkpoint, Mapping) else read_checkpoint_file(checkpoint)
    weights = rename_decoder(named_tensors(content, source), source)
    with init_empty_weights():
        model = model_class(**{**infer_config(weights, source), "time_upscale": time_upscale, **config})
    expected = model.state_dict()
    for name, tensor in weights.items():
        if name.endswith("time_conv.weight") and name in expected and len(tensor) == 2 * len(expected[name]):
            weights[name] = tensor[-len(expected[name]) :]
    check_against_model(weights, model)
    for name, tensor in weights.items():
        # A copy, so that the model does not depend on the mapped file staying as it is.
        weights[name] = tensor.detach().to("cpu", torch_dtype or tensor.dtype, copy=True).contiguous()
        check_finite(weights[name], name)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def rename_decoder(weights: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """
    Return the decoder's weights under the names of [`TinyVideoDecoder`]; names that are unknown stay as they are.

    Raises:
        ValueError: If there is no decoder, or weights are no floats of 16 or 32 bits.
    """
    own = {name: tensor for name, tensor in weights.items() if not name.startswith(_ENCODER)}
    if not any(name.startswith(f"{_DECODER}1.") for name in own):
        raise ValueError(
            f"{source} holds no tiny decoder (TAEHV): there is no {_DECODER}1.weight among its {len(weights)} tensors "
            f"({first_names(weights) or 'none'})."
        )
    if strange := [name for name, tensor in own.items() if tensor.dtype not in _FLOATS]:
        raise ValueError(f"{source}: {strange[0]} is {own[strange[0]].dtype}; weights are floats of 16 or 32 bits.")
    return {_own_name(name): tensor for name, tensor in own.items()}


def _own_name(name: str) -> str:
    index, _, rest = name.removeprefix(_DECODER).partition(".")
    layer = LAYERS.get(int(index)) if index.isdecimal() and name.startswith(_DECODER) else None
    if layer is None:
        return name
    part, _, parameter = rest.rpartition(".")
    return ".".join(word for word in (layer, PARTS.get(part, part), parameter) if word)


def infer_config(weights: Mapping[str, torch.Tensor], source: str) -> dict[str, Any]:
    """
    Read the sizes of the network from the shapes of its weights.

    Raises:
        ValueError: If a weight that shows one is missing, or is no convolution of 3x3 pixels.
    """
    shown = ["conv_in", *(f"stages.{stage}.conv_out" for stage in range(3)), "conv_out"]
    shapes = [tuple(weights[f"{name}.weight"].shape) if f"{name}.weight" in weights else None for name in shown]
    for name, shape in zip(shown, shapes, strict=True):
        if shape is None or len(shape) != 4 or 0 in shape:
            raise ValueError(f"{source} is no tiny decoder (TAEHV): its {name}.weight is {shape or 'missing'}.")
    in_shape, *stage_shapes, out_shape = [shape for shape in shapes if shape is not None]
    return {
        "latent_channels": in_shape[1],
        "block_out_channels": (in_shape[0], *(shape[0] for shape in stage_shapes)),
        "patch_size": max(1, math.isqrt(out_shape[0] // 3)),
    }
