"""The reference's packed NVFP4 checkpoints: each quantized layer as four tensors in place of its weight.

    <layer>.quantized_weight_values          uint8 [out, in / 2]
    <layer>.quantized_weight_scale_factors   float8_e4m3fn, 1-D, in the tiles that tensor cores need
    <layer>.quantized_weight_amax            float32 [1], or [] if it was written on a CPU
    <layer>.quantized_weight_metadata        int32 (out, in, padded out, padded in)

The rule by which they were quantized is stored beside the weights, under "quantization"; without it, `amax` has no
meaning.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..nvfp4.format import BLOCK, NVFP4Tensor, Weight, Weights, check_stored
from ..nvfp4.matmul import unswizzle
from ..nvfp4.rules import scale_rule_named


_MARK = ".quantized_weight_"
_PARTS = ("values", "scale_factors", "amax", "metadata")
_TRANSPOSED = "quantized_weight_transposed_"  # copies for training, which follow from the other tensors


def is_packed(weights: Mapping[str, Any]) -> bool:
    """Whether any layer is stored in NVFP4."""
    return any(key.endswith(f"{_MARK}values") for key in weights)


def packed_rule(content: Mapping[str, Any], given: str | None, source: str) -> str:
    """
    Return the name of the rule by which a checkpoint's weights were quantized.

    Args:
        content: The complete checkpoint.
        given: The rule according to the caller; None: the checkpoint has to say it.
        source: The name of the checkpoint, for error messages.

    Raises:
        ValueError: If neither says it, the two differ, or there is no such rule.
    """
    quantization = content.get("quantization")
    described = quantization if isinstance(quantization, Mapping) else {}
    stored = described.get("weight_scale_rule") or described.get("scale_rule")
    rule = stored or given
    if rule is None:
        raise ValueError(
            f"{source} is packed in NVFP4, but does not say by which rule ('quantization' with 'weight_scale_rule'); "
            "its scales cannot be read without. Give weight_scale_rule, 'mse' for LongLive-2.0's inference models."
        )
    if None not in (stored, given) and stored != given:
        raise ValueError(f"{source} was quantized by the rule {stored!r}, weight_scale_rule={given!r} was given.")
    return scale_rule_named(rule).name


def join_packed(weights: Mapping[str, Weight], rule: str, source: str) -> Weights:
    """
    Return the weights with the four tensors of each packed layer replaced by one `NVFP4Tensor`, `<layer>.weight`.

    Raises:
        ValueError: If one of the four is missing, of a wrong dtype or size, damaged, or of another rule.
    """
    layers = {key.split(_MARK)[0] for key in weights if key.endswith(f"{_MARK}values")}
    joined = {key: tensor for key, tensor in weights.items() if _MARK not in key and _TRANSPOSED not in key}
    for layer in sorted(layers):
        stored = {part: weights.get(f"{layer}{_MARK}{part}") for part in _PARTS}
        parts = {part: tensor for part, tensor in stored.items() if isinstance(tensor, torch.Tensor)}
        if missing := [part for part in _PARTS if part not in parts]:
            raise ValueError(f"{source}: {layer} has no quantized_weight_{', quantized_weight_'.join(missing)}.")
        try:
            joined[f"{layer}.weight"] = _join(**parts, rule=rule)
        except ValueError as error:
            raise ValueError(f"{source}: {layer}: {error}") from error
    return joined


def _join(
    values: torch.Tensor, scale_factors: torch.Tensor, amax: torch.Tensor, metadata: torch.Tensor, rule: str
) -> NVFP4Tensor:
    if metadata.numel() != 4 or metadata.is_floating_point():
        raise ValueError(f"its metadata are 4 whole numbers (sizes), got {metadata.dtype} {tuple(metadata.shape)}.")
    rows, columns, padded_rows, padded_columns = metadata.tolist()
    if tuple(values.shape) not in ((rows, columns // 2), (padded_rows, padded_columns // 2)):
        raise ValueError(f"its values are {tuple(values.shape)}, its metadata say {rows} x {columns // 2}.")
    if scale_factors.dtype != torch.float8_e4m3fn or amax.numel() != 1:
        raise ValueError(
            f"its scales are {scale_factors.dtype} and its amax has {amax.numel()} numbers; float8_e4m3fn and 1 were "
            "expected. (`.to(dtype)` on the reference's model spoils both.)"
        )
    scales = unswizzle(scale_factors, padded_rows, padded_columns // BLOCK)
    codes = values[:rows, : columns // 2].contiguous()
    scales = scales.view(torch.uint8)[:rows, : columns // BLOCK].contiguous().view(torch.float8_e4m3fn)
    tensor = NVFP4Tensor(codes, scales, amax.reshape(1), rule)
    check_stored(tensor)
    return tensor
