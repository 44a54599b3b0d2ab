"""Read a LoRA in PEFT's layout, such as the reference's, as a dictionary that diffusers' `load_lora_weights` takes.

The reference saves PEFT's own state dict of the generator under "generator_lora", with Wan's original module names
(`base_model.model.blocks.0.self_attn.q.lora_A.weight`) and without the adapter's configuration; PEFT itself saves the
same with a configuration beside it. diffusers expects `transformer.blocks.0.attn1.to_q.lora_A.weight`, and assumes
that alpha is the rank if none is given; another alpha is therefore multiplied into lora_B here, which changes nothing
else.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from ..number_checks import is_finite
from ..nvfp4.format import NVFP4Tensor, Weight
from ..nvfp4.lora import check_no_magnitudes
from ..wording import counted
from .checkpoint_file import check_finite, named_tensors, read_checkpoint_file
from .lora_file import LORA_SUFFIXES, LoraFile, read_lora_file
from .names import first_names
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
_SETTINGS = ("alpha", "lora_alpha", "use_rslora", "alpha_pattern")


def is_original_lora(checkpoint: Checkpoint) -> bool:
    """Whether `checkpoint` is a LoRA in PEFT's layout, such as the reference's, which `read_original_lora` reads.

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
    content, _ = _unwrap(checkpoint)
    tensors = (key for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor))
    return any(
        (".lora_A." in key or ".lora_B." in key)
        and not key.startswith("transformer.")
        and not key.startswith("diffusion_model.")
        and strip_wrappers(key).startswith(_WAN_MODULES)
        for key in tensors
    )


def read_original_lora(checkpoint: Checkpoint | LoraFile, *, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """Read the generator's LoRA for `pipe.load_lora_weights(...)`.

    Args:
        checkpoint: The path of a `.pt` or `.safetensors` file, or the loaded dictionary (not modified): PEFT's state
            dict, bare or under "generator_lora", with or without wrapper names and adapter names in its keys. An
            `adapter_config.json` beside the file is read, too.
        alpha: The LoRA's alpha, if it is not the rank and not stored with the weights. The weights' change is
            `alpha / rank * lora_B @ lora_A` (arXiv 2106.09685, section 4.1).

    Returns:
        `{"transformer.<layer>.lora_A.weight": [rank, in], "transformer.<layer>.lora_B.weight": [out, rank]}` with
        diffusers' names of the layers and alpha equal to the rank.

    Raises:
        ValueError: If the file cannot be read, or holds no LoRA, an empty one, or something besides lora_A and lora_B;
            if a layer is incomplete, or shapes or ranks disagree; if `alpha` is no finite number, or contradicts the
            file.
    """
    if alpha is not None:
        _check_alpha(alpha, "all layers", source="The given argument")
    if isinstance(checkpoint, Mapping):
        lora = LoraFile("The given dictionary", checkpoint)
    else:
        lora = checkpoint if isinstance(checkpoint, LoraFile) else read_lora_file(Path(checkpoint))
    source = lora.source
    content, settings = _unwrap(lora.content)
    settings = {**lora.settings, **settings}
    layers = _layers(named_tensors(content, source), source=source)
    rank = _common_rank(layers, settings, source=source)

    scales = {name: _scale(name, parts, rank, alpha, settings, source=source) for name, parts in layers.items()}
    renamed = rename_to_diffusers(
        {
            f"{name}.{part}.weight": parts[part] if part == "lora_A" else _scaled(parts[part], scales[name])
            for name, parts in layers.items()
            for part in ("lora_A", "lora_B")
        }
    )
    return {f"transformer.{name}": tensor for name, tensor in renamed.items()}


def read_lora(lora: LoraFile, convert: Callable[..., Any]) -> tuple[dict[str, torch.Tensor], Mapping[str, Any] | None]:
    """Read a LoRA of any layout for diffusers' `load_lora_weights`.

    Args:
        lora: The LoRA's file, or a dictionary as one.
        convert: diffusers' own function, which turns the layouts of other trainers into its own.

    Returns:
        `{"transformer.<layer>.lora_A.weight": [rank, in], ...}`, and diffusers' settings of the adapter, if there are.

    Raises:
        ValueError: If it is no LoRA of this model, incomplete or damaged.
    """
    if is_original_lora(lora.content):
        return read_original_lora(lora), None
    tensors = named_tensors(lora.content, lora.source)
    if not any("lora" in key or "lokr" in key for key in tensors):
        raise ValueError(f"{lora.source} is not a LoRA: none of its {len(tensors)} tensors is of a LoRA layer.")
    if halves := [key for key in tensors if (partner := _partner(key)) is not None and partner not in tensors]:
        raise ValueError(
            f"{lora.source}: {counted(len(halves), 'layer')} without lora_A or lora_B: {first_names(halves)}."
        )
    try:
        state = convert(dict(tensors))
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{lora.source} is not a LoRA of this model: its {counted(len(tensors), 'key')} ({first_names(tensors)}) "
            f"cannot be converted ({error})."
        ) from error
    if lora.metadata is not None:
        _check_metadata(lora.metadata, state, source=lora.source)
    # Where layers have an alpha of their own, diffusers has multiplied it into them already.
    elif "lora_alpha" in lora.settings and not any(key.endswith(".alpha") for key in tensors):
        for key in [key for key in state if key.endswith(".lora_B.weight")]:
            layer = {"lora_A": state[key.replace(".lora_B.", ".lora_A.")], "lora_B": state[key]}
            rank = layer["lora_B"].shape[-1]
            name = key.removeprefix("transformer.").removesuffix(".lora_B.weight")
            state[key] = _scaled(state[key], _scale(name, layer, rank, None, lora.settings, source=lora.source))
    return state, lora.metadata


def _check_metadata(metadata: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Check the settings that diffusers hands to PEFT, which fails on them in words of its own."""
    prefix = "transformer."
    settings = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    if unknown := sorted(set(settings) - {field.name for field in fields(LoraConfig)}):
        raise ValueError(f"{source} has settings that this release of PEFT does not know: {', '.join(unknown)}.")
    ranks = {tensor.shape[0] for key, tensor in state.items() if key.endswith(".lora_A.weight") and tensor.ndim}
    if settings.get("r") not in ranks and not settings.get("rank_pattern"):
        found = " and ".join(map(str, sorted(ranks)))
        raise ValueError(f"{source}: its settings say rank {settings.get('r')!r} (r), its layers have rank {found}.")
    _check_alpha(settings.get("lora_alpha"), "all layers", source=source)


def check_lora_fits(lora: Mapping[str, torch.Tensor], weights: Mapping[str, Weight]) -> None:
    """Compare a LoRA with the weights of the transformer it is for; both may be on the meta device.

    Args:
        lora: The LoRA in diffusers' layout, such as `read_original_lora` returns. Keys that do not begin with
            "transformer." are of other models, which diffusers leaves out.
        weights: The transformer's weights, `{diffusers name: tensor}`; it may carry other LoRAs already.

    Raises:
        ValueError: If no layer is for the transformer, a layer's target is not among the weights or has other sizes,
            a layer is incomplete, its halves have different ranks, or it has infinities or NaN; for a DoRA of a layer
            in NVFP4.
    """
    own = {key.removeprefix("transformer."): tensor for key, tensor in lora.items() if key.startswith("transformer.")}
    if not own:
        raise ValueError(
            f"Nothing of this LoRA is for the transformer: none of its {len(lora)} keys is ({first_names(lora)})."
        )
    if any(".lokr_" in key for key in own):
        return  # Kronecker products (LoKr): diffusers knows their layout, and checks it
    in_nvfp4 = (name for name, weight in weights.items() if isinstance(weight, NVFP4Tensor))
    check_no_magnitudes(own, (name.removesuffix(".weight") for name in in_nvfp4))
    targets = {name.replace(".base_layer.", "."): tuple(weight.shape) for name, weight in weights.items()}
    problems = {}
    for key, tensor in own.items():
        name, found, part = key.partition(".lora_")
        if not found or part not in ("A.weight", "B.weight", "B.bias", "magnitude_vector", "magnitude_vector.weight"):
            problems[name] = f"{key} is no part of a LoRA"
        elif name not in problems and part in ("A.weight", "B.weight"):
            problems[name] = _problem(name, own, targets.get(f"{name}.weight"))
        if tensor.device.type != "meta" and tensor.numel():
            check_finite(tensor, f"The LoRA's {key}")
    if unfit := [problem for problem in problems.values() if problem is not None]:
        count = counted(len(unfit), "layer")
        raise ValueError(f"The LoRA is for another model; it does not fit in {count}: {'; '.join(unfit[:4])}.")


def _problem(name: str, lora: Mapping[str, torch.Tensor], target: tuple[int, ...] | None) -> str | None:
    down, up = lora.get(f"{name}.lora_A.weight"), lora.get(f"{name}.lora_B.weight")
    if down is None or up is None:
        return f"{name} has no {'lora_A' if down is None else 'lora_B'}"
    if target is None:
        return f"{name} does not exist"
    if not (down.is_floating_point() and up.is_floating_point()):
        return f"{name} has {down.dtype} and {up.dtype}, not floats"
    if _has_rank_0(down, up):
        return f"{name} has rank 0: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
        return f"{name} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}, which disagree on the rank"
    if target[:2] != (up.shape[0], down.shape[1]):
        return f"{name} is {target}, its LoRA {(up.shape[0], down.shape[1])}"
    return None


def _has_rank_0(down: torch.Tensor, up: torch.Tensor) -> bool:
    return down.ndim >= 2 and up.ndim >= 2 and down.shape[0] == up.shape[1] == 0


def _partner(key: str) -> str | None:
    """Return the key of the other half of a layer, or None if the key is not of a half."""
    for half, other in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
        for one, two in ((half, other), (other, half)):
            if key.endswith(".weight") and f".{one}." in key:
                return key.replace(f".{one}.", f".{two}.")
    return None


def _unwrap(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return the dictionary with tensors inside `content`, and the adapter's settings found on the way."""
    settings: dict[str, Any] = {}
    for _ in range(4):
        scalars = {key: value for key, value in content.items() if isinstance(value, (int, float, bool))}
        nested = [content[key] for key in _CONFIG_DICTS if isinstance(content.get(key), Mapping)]
        for entry in (scalars, *nested):
            settings.update((key, entry[key]) for key in _SETTINGS if key in entry)
        inner = [key for key in _LORA_DICTS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = content[inner[0]]
    return content, settings


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
            f"{source} is not a LoRA of this model: none of its {len(tensors)} keys is ({first_names(unknown)})."
        )
    if unknown:
        raise ValueError(
            f"{source} holds {counted(len(unknown), 'key')} of no plain LoRA layer: {first_names(unknown)}."
        )
    if halves := [name for name, layer in layers.items() if not {"lora_A", "lora_B"} <= set(layer)]:
        raise ValueError(f"{source}: {counted(len(halves), 'layer')} without lora_A or lora_B: {first_names(halves)}.")
    return layers


def _common_rank(layers: Mapping[str, Mapping[str, torch.Tensor]], settings: Mapping[str, Any], *, source: str) -> int:
    for name, layer in layers.items():
        down, up = layer["lora_A"], layer["lora_B"]
        if _has_rank_0(down, up):
            raise ValueError(f"{source}: the LoRA of {name} has rank 0 ({tuple(down.shape)} and {tuple(up.shape)}).")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"{source}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} of {name} do not agree on a rank; "
                "[rank, in] and [out, rank] are expected."
            )
        if not (down.is_floating_point() and up.is_floating_point()):
            raise ValueError(f"{source}: {name} holds {down.dtype} and {up.dtype}; floats are expected.")
    ranks = Counter(layer["lora_A"].shape[0] for layer in layers.values())
    if len(ranks) > 1:
        counts = ", ".join(f"rank {rank} in {counted(count, 'layer')}" for rank, count in ranks.most_common())
        raise ValueError(f"{source}: the layers' ranks disagree ({counts}); one rank for all is expected.")
    rank = next(iter(ranks))
    if settings.get("r", rank) != rank and not settings.get("rank_pattern"):
        raise ValueError(f"{source}: its settings say rank {settings['r']!r} (r), its layers have rank {rank}.")
    return rank


def _scale(
    name: str,
    layer: Mapping[str, torch.Tensor],
    rank: int,
    given: float | None,
    settings: Mapping[str, Any],
    *,
    source: str,
) -> float:
    stored = _alpha_of_pattern(settings.get("alpha_pattern") or {}, name, source=source)
    if stored is None:
        stored = settings.get("lora_alpha", settings.get("alpha"))
    if "alpha" in layer:
        if layer["alpha"].numel() != 1:
            raise ValueError(f"{source}: alpha of {name} is {tuple(layer['alpha'].shape)}, one number is expected.")
        stored = layer["alpha"].item()
    if stored is not None:
        _check_alpha(stored, name, source=source)
    if stored is not None and given is not None and not math.isclose(stored, given):
        raise ValueError(f"{source} says alpha={stored} for {name}, but alpha={given} was given.")
    alpha = given if stored is None else stored
    if alpha is None:
        return 1.0
    # Rank-stabilized LoRA (arXiv 2312.03732) divides by the square root of the rank.
    return alpha / (math.sqrt(rank) if settings.get("use_rslora", False) else rank)


def _alpha_of_pattern(patterns: Any, name: str, *, source: str) -> Any:
    """Return the alpha that PEFT's `alpha_pattern` has for a layer; None if it has none."""
    try:
        found = [alpha for pattern, alpha in dict(patterns).items() if re.fullmatch(rf"(.*\.)?({pattern})", name)]
    except (re.error, TypeError, ValueError) as error:
        raise ValueError(f"{source}: its alpha_pattern {patterns!r} is not possible: {error}.") from error
    return found[0] if found else None


def _check_alpha(alpha: Any, name: str, *, source: str) -> None:
    if not is_finite(alpha):
        raise ValueError(f"{source} says alpha={alpha!r} for {name}; a finite number is expected.")


def _scaled(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    return tensor if scale == 1.0 else (tensor.float() * scale).to(tensor.dtype)
