"""Read the reference's LoRA file as a dictionary that diffusers' `load_lora_weights` takes.

The reference saves PEFT's own state dict of the generator under "generator_lora", with Wan's original module names
(`base_model.model.blocks.0.self_attn.q.lora_A.weight`) and without the adapter's configuration. diffusers expects
`transformer.blocks.0.attn1.to_q.lora_A.weight`, and assumes that alpha is the rank if none is given; another alpha is
therefore multiplied into lora_B here, which changes nothing else.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..nvfp4.format import Weight
from .checkpoint_file import read_checkpoint_file
from .original import Checkpoint, rename_to_diffusers, strip_wrappers


_LORA_DICTS = ("generator_lora", "lora", "generator", "state_dict", "model", "module")
_CONFIG_DICTS = ("lora_config", "peft_config", "adapter_config", "adapter", "config")
_WAN_MODULES = (
    "blocks.",
    "patch_embedding.",
    "text_embedding.",
    "time_embedding.",
    "time_projection.",
    "head.",
    "condition_embedder.",
    "proj_out.",
)
_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".alpha")
LORA_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def is_original_lora(checkpoint: Checkpoint) -> bool:
    """Whether `checkpoint` is a LoRA in the reference's layout, which `read_original_lora` reads.

    Files in diffusers' layouts (keys that begin with `transformer.`, `diffusion_model.` or `lora_unet_`), folders and
    names of Hub repos are not.

    Raises:
        ValueError: If `checkpoint` is an existing weight file that is truncated, damaged or of no known kind.
    """
    if not isinstance(checkpoint, Mapping):
        path = Path(checkpoint)
        if not path.is_file() or path.suffix not in LORA_SUFFIXES:
            return False
        checkpoint = read_checkpoint_file(path)
    if "generator_lora" in checkpoint:
        return True
    tensors, _ = _unwrap(checkpoint)
    return any(
        ".lora_A." in key and not key.startswith("diffusion_model.") and strip_wrappers(key).startswith(_WAN_MODULES)
        for key in tensors
    )


def read_original_lora(checkpoint: Checkpoint, *, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """Read the generator's LoRA for `pipe.load_lora_weights(...)`.

    Args:
        checkpoint: The path of a `.pt` or `.safetensors` file, or the loaded dictionary (not modified): PEFT's state
            dict, bare or under "generator_lora", with or without wrapper names and adapter names in its keys.
        alpha: The LoRA's alpha, if it is not the rank and not stored in the file. The weights' change is
            `alpha / rank * lora_B @ lora_A` (arXiv 2106.09685, section 4.1).

    Returns:
        `{"transformer.<layer>.lora_A.weight": [rank, in], "transformer.<layer>.lora_B.weight": [out, rank]}` with
        diffusers' names of the layers and alpha equal to the rank.

    Raises:
        ValueError: If the file cannot be read, or holds no LoRA, an empty one, or something besides lora_A and lora_B;
            if a layer is incomplete, or shapes or ranks disagree; if `alpha` contradicts the file.
    """
    source = "The given dictionary" if isinstance(checkpoint, Mapping) else str(checkpoint)
    content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint_file(checkpoint)
    tensors, settings = _unwrap(content)
    layers = _layers(tensors, source=source)
    rank = _common_rank(layers, source=source)

    scales = {name: _scale(name, parts, rank, alpha, settings, source=source) for name, parts in layers.items()}
    renamed = rename_to_diffusers(
        {
            f"{name}.{part}.weight": parts[part] if part == "lora_A" else _scaled(parts[part], scales[name])
            for name, parts in layers.items()
            for part in ("lora_A", "lora_B")
        }
    )
    return {f"transformer.{name}": tensor for name, tensor in renamed.items()}


def check_lora_fits(lora: Mapping[str, torch.Tensor], weights: Mapping[str, Weight]) -> None:
    """Compare a LoRA with the weights of the transformer it is for; both may be on the meta device.

    Args:
        lora: The LoRA in diffusers' layout, such as `read_original_lora` returns.
        weights: The transformer's weights, `{diffusers name: tensor}`.

    Raises:
        ValueError: If a layer's target is not among the weights or has other sizes, or if a layer is incomplete.
    """
    problems = []
    for key, lora_A in lora.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        lora_B = lora.get(key.replace(".lora_A.", ".lora_B."))
        target = weights.get(f"{name}.weight")
        if lora_B is None:
            problems.append(f"{name} has no lora_B")
        elif target is None:
            problems.append(f"{name} does not exist")
        elif tuple(target.shape) != (lora_B.shape[0], lora_A.shape[1]):
            problems.append(f"{name} is {tuple(target.shape)}, its LoRA {(lora_B.shape[0], lora_A.shape[1])}")
    if problems:
        raise ValueError(
            f"The LoRA is for another model; {len(problems)} layers do not fit: {'; '.join(problems[:4])}."
        )


def _unwrap(content: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the dictionary of tensors inside `content`, and the adapter's settings found on the way."""
    settings: dict[str, Any] = {}
    for _ in range(4):
        scalars = {key: value for key, value in content.items() if isinstance(value, (int, float, bool))}
        nested = [content[key] for key in _CONFIG_DICTS if isinstance(content.get(key), Mapping)]
        for entry in (scalars, *nested):
            settings.update((key, entry[key]) for key in ("alpha", "lora_alpha", "use_rslora") if key in entry)
        inner = [key for key in _LORA_DICTS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = content[inner[0]]
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}, settings


def _layers(tensors: Mapping[str, torch.Tensor], *, source: str) -> dict[str, dict[str, torch.Tensor]]:
    """Group `{key: tensor}` as `{Wan module: {"lora_A": [rank, in], "lora_B": [out, rank], maybe "alpha": []}}`."""
    if not tensors:
        raise ValueError(f"{source} holds an empty LoRA: there is no tensor in it.")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        name = strip_wrappers(key.removeprefix("transformer."))
        # PEFT puts the adapter's name before "weight" unless told otherwise: q.lora_A.default.weight
        parts = name.split(".")
        if parts[-3:-2] in (["lora_A"], ["lora_B"]):
            name = ".".join((*parts[:-2], parts[-1]))
        if not name.endswith(_SUFFIXES) or not name.startswith(_WAN_MODULES):
            unknown.append(key)
            continue
        suffix = next(suffix for suffix in _SUFFIXES if name.endswith(suffix))
        layer = layers.setdefault(name.removesuffix(suffix), {})
        part = suffix.split(".")[1]
        if part in layer:
            raise ValueError(f"{source} holds several adapters: {key} is there more than once.")
        layer[part] = tensor
    if not layers:
        raise ValueError(
            f"{source} is not a LoRA of this model: none of its {len(tensors)} keys is ({_first(unknown)})."
        )
    if unknown:
        raise ValueError(f"{source} holds {len(unknown)} keys that are no plain LoRA layers: {_first(unknown)}.")
    if halves := [name for name, layer in layers.items() if not {"lora_A", "lora_B"} <= set(layer)]:
        raise ValueError(f"{source}: {len(halves)} layers lack their lora_A or lora_B: {_first(halves)}.")
    return layers


def _common_rank(layers: Mapping[str, Mapping[str, torch.Tensor]], *, source: str) -> int:
    for name, layer in layers.items():
        down, up = layer["lora_A"], layer["lora_B"]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
            raise ValueError(
                f"{source}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} of {name} do not agree on a rank; "
                "[rank, in] and [out, rank] are expected."
            )
        if not (down.is_floating_point() and up.is_floating_point()):
            raise ValueError(f"{source}: {name} holds {down.dtype} and {up.dtype}; floats are expected.")
    ranks = Counter(layer["lora_A"].shape[0] for layer in layers.values())
    if len(ranks) > 1:
        counts = ", ".join(f"rank {rank} in {count} layers" for rank, count in ranks.most_common())
        raise ValueError(f"{source}: the layers' ranks disagree ({counts}); one rank for all is expected.")
    return next(iter(ranks))


def _scale(
    name: str,
    layer: Mapping[str, torch.Tensor],
    rank: int,
    given: float | None,
    settings: Mapping[str, Any],
    *,
    source: str,
) -> float:
    stored = settings.get("lora_alpha", settings.get("alpha"))
    if "alpha" in layer:
        stored = layer["alpha"].item()
    if stored is not None and given is not None and not math.isclose(stored, given):
        raise ValueError(f"{source} says alpha={stored} for {name}, but alpha={given} was given.")
    alpha = given if stored is None else stored
    if alpha is None:
        return 1.0
    # Rank-stabilized LoRA (arXiv 2312.03732) divides by the square root of the rank.
    return alpha / (math.sqrt(rank) if settings.get("use_rslora", False) else rank)


def _scaled(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    return tensor if scale == 1.0 else (tensor.float() * scale).to(tensor.dtype)


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
