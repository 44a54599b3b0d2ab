"""A user's callback at the end of every solver step: whether it is one, what it may ask for and what it may return."""

from collections.abc import Callable, Sequence

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..tensor_checks import check_finite, check_floats


CALLBACK_TENSOR_INPUTS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def resolve_callback_inputs(callback: Callable | None, names: Sequence[str] | str | None) -> tuple[str, ...]:
    """
    Resolve the names of the tensors that a callback gets; one of diffusers' kind names them itself.

    Raises:
        ValueError: If `callback` cannot be called, or for a tensor that callbacks cannot get.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` must be a function or a PipelineCallback, got {callback!r}.")
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, Sequence):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be a list of names, got {names!r}.")
    unknown = [name for name in names if name not in CALLBACK_TENSOR_INPUTS]
    if unknown:
        allowed = list(CALLBACK_TENSOR_INPUTS)
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be in {allowed}, got {unknown}.")
    return tuple(names)


def check_returned(returned: object, tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """
    Check what a callback returned, None or changed tensors by name, against the tensors that there were.

    Raises:
        ValueError: For anything else: other types, names that nothing is read from, tensors that are no floats, of
            other shapes (prompts may have another number of tokens) or, on a CPU, with infinities or NaN.
    """
    if returned is None:
        return {}
    if not isinstance(returned, dict):
        raise ValueError(f"A callback must return a dict of tensors, or None, got {type(returned).__name__}.")
    unknown = [name for name in returned if name not in tensors]
    if unknown:
        raise ValueError(f"A callback may return tensors of {list(tensors)}, got {unknown}.")
    for name, tensor in returned.items():
        before = tensors[name]
        if tensor is before:
            continue
        if before is None:
            raise ValueError(f"A callback returned `{name}`, but without guidance there is none.")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"A callback must return `{name}` as a tensor, got {type(tensor).__name__}.")
        check_floats(f"What a callback returned as `{name}`", tensor)
        expected, shape = list(before.shape), list(tensor.shape)
        if name != "latents" and len(shape) == 3 and shape[1]:
            expected[1] = shape[1]
        if shape != expected:
            raise ValueError(f"A callback must return `{name}` of shape {list(before.shape)}, got {shape}.")
        if tensor.device.type == "cpu":  # elsewhere, it would have to be waited for; there, the frames are looked at
            check_finite(f"What a callback returned as `{name}`", tensor)
    return returned
