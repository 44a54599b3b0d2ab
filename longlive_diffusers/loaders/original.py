"""Load a LongLive checkpoint in the original format as a diffusers transformer.

The reference writes the generator's state dict into one of several dictionaries ("generator", "generator_ema",
"state_dict", ...), under names that carry the marks of every wrapper that the model was saved in (FSDP, DDP,
torch.compile, activation checkpointing, its own `WanDiffusionWrapper`). Underneath are the names of Wan's own code,
which diffusers maps one to one to those of `WanTransformer3DModel`. The network's sizes are not in the file, but the
shapes of the weights show all of them, except the number of attention heads.

All names and shapes are checked against a model on the meta device before the first weight is allocated.
"""

import inspect
import math
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.utils import logging
from torch import nn

from ..number_checks import check_booleans
from ..nvfp4.format import NVFP4Tensor, Weight, Weights
from ..nvfp4.quantizer import NVFP4Config, mark_quantized
from ..setting_types import check_setting_types
from .checkpoint_file import check_finite, named_tensors, read_checkpoint_file
from .packed_nvfp4 import is_packed, join_packed, packed_rule


logger = logging.get_logger(__name__)

Checkpoint = str | os.PathLike | Mapping[str, Any]
Model = TypeVar("Model", bound=ModelMixin)
AnyWeight = TypeVar("AnyWeight", bound=Weight)

DEFAULT_HEAD_DIM = 128  # that of every published Wan model; the shapes do not show it

# No module of the network has one of these names, so they are dropped wherever they occur in a key.
_WRAPPER_MODULES = frozenset(
    {
        "base_model",
        "model",
        "module",
        "diffusion_model",
        "_fsdp_wrapped_module",
        "_orig_mod",
        "_checkpoint_wrapped_module",
    }
)
_WRAPPER_DICTS = ("state_dict", "model", "module")
_LEGACY_FORMAT = "longlive_generator_te_nvfp4"
_FP16_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *_FP16_DTYPES, torch.float64)


def load_original_transformer(
    checkpoint: Checkpoint,
    model_class: type[Model],
    *,
    use_ema: bool = False,
    device: str | torch.device | None = None,
    torch_dtype: torch.dtype | None = None,
    weight_scale_rule: str | None = None,
    **config: Any,
) -> Model:
    """Build the transformer from a checkpoint of the reference implementation.

    A checkpoint that is packed in NVFP4 stays packed: its layers are `NVFP4Linear`, and the model is saved as a
    quantized one.

    Args:
        checkpoint: The path of a `.pt`/`.pth`/`.safetensors` file, or a state dict, wrapped or not. It is not
            modified, and the model shares no memory with it. Weights that already have diffusers' names are accepted
            too.
        model_class: The class to build, such as `LongLiveTransformer3DModel`.
        use_ema: Whether to take the averaged weights ("generator_ema") of a file that holds both.
        device: The device of the weights; the CPU by default.
        torch_dtype: As in `from_pretrained`: float32 by default; with float16 and bfloat16, the modules in the class's
            `_keep_in_fp32_modules` stay in float32.
        weight_scale_rule: The scale rule of a packed checkpoint that does not say by which rule it was quantized.
        **config: Values of the model's configuration that shapes do not show, such as `attention_head_dim` (128 unless
            given), `chunk_size` or `eps`. Those that shapes do show may be given too, and have to agree.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the file cannot be read or is of another kind (LoRA, VAE, image-to-video, ...), if keys are
            missing or unexpected, if a shape or a configuration value contradicts the others, or if a weight has
            infinities or NaN (also by conversion to `torch_dtype`).
    """
    if torch_dtype is None:
        torch_dtype = torch.float32
    if torch_dtype not in _DTYPES:
        raise ValueError(f"torch_dtype has to be one of {', '.join(map(str, _DTYPES))}, not {torch_dtype}.")

    check_setting_types(config, model_class)
    weights = read_original_state_dict(checkpoint, use_ema=use_ema, weight_scale_rule=weight_scale_rule)
    model = _empty_model(model_class, infer_transformer_config(weights, **config))
    check_against_model(weights, model)

    packed = {name: weight for name, weight in weights.items() if isinstance(weight, NVFP4Tensor)}
    state_dict = {name: weight for name, weight in weights.items() if isinstance(weight, torch.Tensor)}
    del weights  # so that each of the caller's tensors can be freed once it has been copied
    fp32_modules = set(model_class._keep_in_fp32_modules or ()) if torch_dtype in _FP16_DTYPES else set()
    for name in list(state_dict):
        dtype = torch_dtype if fp32_modules.isdisjoint(name.split(".")) else torch.float32
        # A copy, so that the model depends neither on the caller's tensors nor on the mapped file staying as it is.
        tensor = state_dict[name].detach().to(device=device or "cpu", dtype=dtype, copy=True)
        check_finite(tensor, name)
        state_dict[name] = tensor.contiguous()
    model.load_state_dict(state_dict, assign=True, strict=not packed)
    if packed:
        _put_packed(model, packed, device)
    if device is not None:
        nn.Module.to(model, device)  # the buffers, which are computed and not in the checkpoint
    return model.eval()


def _put_packed(model: ModelMixin, packed: Mapping[str, NVFP4Tensor], device: str | torch.device | None) -> None:
    """Replace the layers whose weights are packed, and make diffusers recognize the model as quantized."""
    rule = next(iter(packed.values())).scale_rule
    config = NVFP4Config(weight_scale_rule=rule, activation_scale_rule=rule)
    layers = {name.removesuffix(".weight"): weight for name, weight in packed.items()}
    # All other layers that the configuration would convert are to stay as they are.
    config.modules_to_not_convert += [
        name for name, module in model.named_modules() if config.converts(name, module) and name not in layers
    ]
    for name, weight in layers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)  # `check_against_model` compared the weights' shapes with its own
        layer = config.empty_layer(linear)
        layer.store(weight.to(device or "cpu"))
        model.set_submodule(name, layer)
    mark_quantized(model, config)


def read_original_state_dict(
    checkpoint: Checkpoint, *, use_ema: bool = False, weight_scale_rule: str | None = None
) -> Weights:
    """Read the generator's weights under diffusers' names.

    Args:
        checkpoint: A path or a (wrapped) state dict, see `load_original_transformer`.
        use_ema: Whether to prefer "generator_ema" to "generator"; if there is only one, it is taken.
        weight_scale_rule: The scale rule of a packed checkpoint that does not say by which rule it was quantized.

    Returns:
        `{diffusers name: tensor}`, an `NVFP4Tensor` for a weight that is packed; the others are the caller's own or
        mapped from the file.

    Raises:
        ValueError: If there are no weights of a Wan text-to-video transformer; the message says what is there instead.
    """
    check_booleans(use_ema=use_ema)
    source = "The given state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    content = dict(checkpoint) if isinstance(checkpoint, Mapping) else read_checkpoint_file(checkpoint)
    if content.get("checkpoint_format") == _LEGACY_FORMAT:
        raise ValueError(
            f"{source} is in the reference's legacy NVFP4 format ({_LEGACY_FORMAT}), which it does not load either. "
            "Its packed file ('model_4o6.pt') and the merged BF16 file of the same model can be loaded."
        )
    weights = _unwrap(content, use_ema=use_ema, source=source)
    if problem := _describe_foreign(weights):
        raise ValueError(f"{source} {problem}")
    if is_packed(weights):
        rule = packed_rule(content, weight_scale_rule, source)
        weights = join_packed({strip_wrappers(key): tensor for key, tensor in weights.items()}, rule, source)

    stripped: Weights = {}
    for key, tensor in weights.items():
        name = strip_wrappers(key)
        if name in stripped:
            raise ValueError(f"{source} holds {name} twice: {key} differs from another key by wrapper names only.")
        if isinstance(tensor, torch.Tensor) and tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{source}: {key} is {tensor.dtype}; a transformer's weights are float32 or 16 bit floats."
            )
        stripped[name] = tensor
    if "patch_embedding.weight" not in stripped:
        names = ", ".join(list(weights)[:4]) or "none"
        raise ValueError(
            f"{source} holds no weights of a Wan transformer: there is no patch_embedding.weight among its "
            f"{len(weights)} tensors ({names}, ...)."
        )
    return rename_to_diffusers(stripped)


def strip_wrappers(key: str) -> str:
    """Drop the names that FSDP, DDP, torch.compile, PEFT and the like leave in a parameter's name."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPER_MODULES)


def rename_to_diffusers(weights: Mapping[str, AnyWeight]) -> dict[str, AnyWeight]:
    """Rename Wan's parameters, or LoRA layers on them, to diffusers' names; names that are diffusers' already stay."""
    # The renaming swaps norm2 and norm3, so it must not be applied to its own result.
    if any(name.startswith("condition_embedder.") or ".attn1." in name or ".attn2." in name for name in weights):
        return dict(weights)
    return convert_wan_transformer_to_diffusers(dict(weights))


def infer_transformer_config(state_dict: Mapping[str, Weight], **config: Any) -> dict[str, Any]:
    """Read the sizes of the network from the shapes of its weights (diffusers' names).

    Args:
        state_dict: The weights under diffusers' names, on any device, meta included.
        **config: Values given by the caller. `attention_head_dim` or `num_attention_heads` settle what shapes do not
            show; by default, heads are 128 wide.

    Returns:
        `config` completed with the sizes, ready for the model's constructor.

    Raises:
        ValueError: If a weight that shows a size is missing or has another number of dimensions, if sizes do not
            divide, or if a given value contradicts the shapes.
    """
    inner_dim, in_channels, *patch_size = _shape(state_dict, "patch_embedding.weight", 5)
    out_features = _shape(state_dict, "proj_out.weight", 2)[0]
    patch_volume = math.prod(patch_size)
    if out_features % patch_volume:
        raise ValueError(
            f"proj_out.weight has {out_features} rows, no multiple of {patch_volume} (patch {tuple(patch_size)})."
        )
    blocks = {
        int(name.split(".")[1]) for name in state_dict if name.startswith("blocks.") and name.split(".")[1].isdigit()
    }
    inferred = {
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "out_channels": out_features // patch_volume,
        "text_dim": _shape(state_dict, "condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": _shape(state_dict, "condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": _shape(state_dict, "blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": max(blocks, default=-1) + 1,
        "cross_attn_norm": any(name.endswith(".norm2.weight") for name in state_dict),
    }
    for name, value in inferred.items():
        given = config.get(name, value)
        if name == "patch_size" and isinstance(given, list):
            given = tuple(given)
        if given != value:
            raise ValueError(f"{name}={given} was given, but the checkpoint's shapes say {name}={value}.")
    heads = _heads(inner_dim, config.get("num_attention_heads"), config.get("attention_head_dim"))
    return {**config, **inferred, **heads}


def _heads(inner_dim: int, num_heads: int | None, head_dim: int | None) -> dict[str, int]:
    if head_dim is None:
        head_dim = DEFAULT_HEAD_DIM if num_heads is None else inner_dim // max(num_heads, 1)
    if num_heads is None:
        num_heads = inner_dim // max(head_dim, 1)
    if num_heads * head_dim != inner_dim or num_heads < 1:
        raise ValueError(
            f"The checkpoint is {inner_dim} wide, which is not {num_heads} heads of {head_dim} channels "
            f"({num_heads * head_dim}). Give attention_head_dim or num_attention_heads."
        )
    return {"num_attention_heads": num_heads, "attention_head_dim": head_dim}


def _shape(state_dict: Mapping[str, Weight], name: str, ndim: int) -> tuple[int, ...]:
    if name not in state_dict:
        raise ValueError(
            f"The checkpoint has no {name}, so it is not a complete transformer ({len(state_dict)} tensors)."
        )
    shape = tuple(state_dict[name].shape)
    if len(shape) != ndim:
        raise ValueError(f"{name} has shape {shape}; {ndim} dimensions are expected.")
    return shape


def _empty_model(model_class: type[Model], config: Mapping[str, Any]) -> Model:
    accepted = set(inspect.signature(model_class.__init__).parameters) - {"self"}
    if unknown := sorted(set(config) - accepted):
        raise ValueError(
            f"{model_class.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(accepted))}."
        )
    with init_empty_weights(include_buffers=False):  # buffers are computed by the constructor: they stay real
        return model_class(**config)


def check_against_model(state_dict: Mapping[str, Weight], model: nn.Module) -> None:
    """Compare the names and shapes of weights with those of the model that they are for, which may be on "meta".

    Raises:
        ValueError: If weights are missing, unexpected or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    wrong = [
        f"{name} {tuple(tensor.shape)} instead of {expected[name]}"
        for name, tensor in state_dict.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", wrong))
        if found
    ]
    if problems:
        raise ValueError(
            f"The checkpoint's {len(state_dict)} tensors are not the {len(expected)} of {type(model).__name__}. "
            + "; ".join(problems)
        )


def _unwrap(content: Mapping[str, Any], *, use_ema: bool, source: str) -> Weights:
    """Follow the wrapping dictionaries down to the one whose values are tensors."""
    is_averaged = False
    for _ in range(4):  # nesting deeper than {"generator": {"model": {"state_dict": ...}}} was never seen
        inner = {key: value for key, value in content.items() if isinstance(value, Mapping) and value}
        preferred = ("generator_ema", "generator") if use_ema else ("generator", "generator_ema")
        found = [key for key in (*preferred, *_WRAPPER_DICTS) if key in inner]
        if not found:
            break
        is_averaged |= found[0] == "generator_ema"
        content = inner[found[0]]
    weights: Weights = named_tensors(content, source, (torch.Tensor, NVFP4Tensor))
    if not weights:
        keys = ", ".join(map(str, list(content)[:6])) or "none"
        kind = " It is a LoRA: load it with load_lora_weights." if "generator_lora" in content else ""
        raise ValueError(f"{source} holds no weights of a generator; its keys are: {keys}.{kind}")
    if use_ema and not is_averaged:
        logger.warning("%s has no generator_ema; the weights that it has are used instead.", source)
    return weights


def _describe_foreign(weights: Mapping[str, Weight]) -> str | None:
    """Return what the weights are, if they are recognizably another model's, as the end of a sentence."""

    def has(*marks: str) -> bool:
        return any(mark in key for key in weights for mark in marks)

    if has(".weight_codes"):
        return (
            "is the state dict of a model that this package quantized to NVFP4. Save the model with save_pretrained, "
            "and open the folder with from_pretrained."
        )
    if has(".lora_A", ".lora_B", ".lora_down", ".lora_up", "lora_unet_"):
        return "is a LoRA, not a complete model: load the base model, then the LoRA with load_lora_weights."
    if has("k_img.", "img_emb.", "add_k_proj.", "image_embedder."):
        return "is a Wan image-to-video (CLIP image attention) model; LongLive has the text-to-video network."
    if has("vace_blocks.", "vace_patch_embedding."):
        return "is a Wan VACE model; LongLive has the text-to-video network."
    if has("encoder.conv1.", "decoder.conv1.", "encoder.conv_in.", "decoder.conv_in.", "post_quant_conv."):
        return f"is a VAE ({len(weights)} tensors), not a transformer."
    if has("token_embedding.weight", "shared.weight", "embed_tokens.weight"):
        return f"is a text encoder or language model ({len(weights)} tensors), not a video transformer."
    return None
