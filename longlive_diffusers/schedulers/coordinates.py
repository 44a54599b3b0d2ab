"""A solver step whose coefficients are computed on the CPU, wherever the latents are.

All that a step of UniPC returns and remembers is a sum of tensors, each times a number. `step_by_coordinates` gives
the step the tensors' coordinates, on the CPU, so that it computes the numbers; the sums are made where the tensors
are. On a GPU, the step by itself has a hundred kernels, and waits for the device eighteen times a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler


def step_by_coordinates(
    scheduler: UniPCMultistepScheduler,
    step: Callable[..., Any],
    model_output: torch.Tensor,
    timestep: int | torch.Tensor,
    sample: torch.Tensor,
) -> torch.Tensor:
    """
    Take a step.

    Args:
        scheduler: The solver, whose `model_outputs` and `last_sample` are what it remembers.
        step: Its plain `step`.
        model_output, timestep, sample: As `step` takes them.

    Returns:
        The next sample, in the dtype of `sample`.
    """
    outputs, last_sample = scheduler.model_outputs, scheduler.last_sample
    remembered = [tensor for tensor in (*outputs, last_sample) if tensor is not None]
    terms = [sample, model_output, *remembered]
    sample_unit, output_unit, *units = torch.eye(len(terms), dtype=torch.float64).split(1)
    next_unit = iter(units)
    try:
        scheduler.model_outputs = [None if tensor is None else next(next_unit) for tensor in outputs]
        scheduler.last_sample = None if last_sample is None else next(next_unit)
        (coordinates,) = step(output_unit, timestep, sample_unit, return_dict=False)
        newest, corrected = scheduler.model_outputs[-1], scheduler.last_sample
        assert newest is not None and corrected is not None  # the step has just set both
        outputs = [*outputs[1:], weighted_sum(terms, newest)]
        last_sample = weighted_sum(terms, corrected)
    finally:
        scheduler.model_outputs, scheduler.last_sample = outputs, last_sample
    return weighted_sum(terms, coordinates)


def weighted_sum(terms: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of `terms`, each times its number in `weights [1, len(terms)]`, in the dtype of the first."""
    total = torch.zeros_like(terms[0])
    for term, weight in zip(terms, weights[0].tolist(), strict=True):
        if weight != 0:  # not a number is not 0
            total = torch.add(total, term.to(total.dtype), alpha=weight)
    return total
