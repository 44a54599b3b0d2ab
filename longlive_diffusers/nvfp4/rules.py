"""How the scales of an NVFP4 tensor are chosen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


MAX_SCALE = 448.0  # the largest E4M3 number


@dataclass(frozen=True)
class ScaleRule:
    """How the scales of a tensor are chosen.

    Args:
        name: The name of the rule in tensors, configurations and files.
        largest_value: The value to which a block's largest number is scaled.
        largest_scale: The scale of the block that holds the tensor's largest number.
        error: The measure that four-over-six minimizes, from the errors of blocks `[n, ...]` to `[...]`; None: no
            choice between two scales is made.
    """

    name: str
    largest_value: float
    largest_scale: float
    error: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def span(self) -> float:
        """The number to which `amax` is scaled before it is split into a value and a block's scale."""
        return self.largest_value * self.largest_scale


def _sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis, neighbors first: in a fixed order, a sum has the same last bit everywhere."""
    while len(terms) > 1:
        terms = terms[::2] + terms[1::2]
    return terms[0]


def _mse(errors: torch.Tensor) -> torch.Tensor:
    return _sum(errors * errors)


def _mae(errors: torch.Tensor) -> torch.Tensor:
    return _sum(errors.abs())


def _abs_max(errors: torch.Tensor) -> torch.Tensor:
    return errors.abs().amax(dim=0)


RULES = {
    rule.name: rule
    for rule in (
        ScaleRule("static_6", 6, 448),
        ScaleRule("static_4", 4, 448),
        # 256: a scale may have to grow by 6 / 4, and 384 is still a scale, where 1.5 * 448 is not.
        ScaleRule("mse", 6, 256, _mse),
        ScaleRule("mae", 6, 256, _mae),
        ScaleRule("abs_max", 6, 256, _abs_max),
        # A scale may be rounded down by 1/17 of itself, and nothing may exceed 6 even then.
        ScaleRule("unbiased", 6 * 16 / 17, 448),
    )
}


def scale_rule_named(name: str) -> ScaleRule:
    """Return the scale rule of that name.

    Raises:
        ValueError: If there is no such rule.
    """
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"A scale rule is one of {', '.join(RULES)}, got {name!r}.")
    return RULES[name]
