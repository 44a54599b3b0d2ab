"""Muon: steps along the orthogonalised momentum of every matrix; what is not a matrix is left to AdamW.

A matrix's gradient is dominated by a few directions. Muon takes the momentum's singular vectors and sets all singular
values to about one, so that rare directions are learnt as fast as common ones (K. Jordan et al., "Muon: an optimizer
for hidden layers in neural networks", 2024; scaled as in arXiv 2502.16982, so that AdamW's learning rates serve). On
the toy world it needs little more than half of AdamW's steps.

`torch.optim.Muon` does this in bfloat16, matrix by matrix, which many a CPU cannot do in any reasonable time; here it
is in float32, and matrices of one shape are orthogonalised together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values towards 1
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """
    Args:
        params: Those with two dimensions are Muon's, all others AdamW's.
        lr, weight_decay: Of both (decoupled).
        momentum: Of Muon, with Nesterov's look ahead.
        betas, eps: Of AdamW.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        params = list(params)
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        groups = [
            {"params": [parameter for parameter in params if (parameter.ndim == 2) == is_matrix], "muon": is_matrix}
            for is_matrix in (True, False)
        ]
        super().__init__([group for group in groups if group["params"]], settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in params:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            (self._step_matrices if group["muon"] else self._step_others)(group, params)

    def _step_matrices(self, group: dict, params: list[torch.nn.Parameter]) -> None:
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
        for parameter in params:
            by_shape[parameter.shape].append(parameter)
        for shape, alike in by_shape.items():
            ahead = []
            for parameter in alike:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead.append(parameter.grad.lerp(momentum, group["momentum"]))
            directions = orthogonalize(torch.stack(ahead))
            # An orthogonal matrix's numbers are small in large matrices; so scaled, they are as large as AdamW's.
            scale = 0.2 * max(shape) ** 0.5
            for parameter, direction in zip(alike, directions, strict=True):
                parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"] * scale)

    def _step_others(self, group: dict, params: list[torch.nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            count = state["step"].item()
            mean = state["mean"].lerp_(parameter.grad, 1 - beta1) / (1 - beta1**count)
            square = state["square"].lerp_(parameter.grad.square(), 1 - beta2) / (1 - beta2**count)
            parameter.addcdiv_(mean, square.sqrt_().add_(group["eps"]), value=-group["lr"])


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """`[n, rows, columns]`: their singular vectors with singular values of about 1 (0.7 to 1.2), float32."""
    states = matrices.float()
    states = states / (torch.linalg.matrix_norm(states).clamp(min=1e-7)[:, None, None])
    is_tall = states.shape[1] > states.shape[2]
    if is_tall:
        states = states.mT
    first, second, third = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = states @ states.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=second, alpha=third)
        states = torch.baddbmm(states, polynomial, states, beta=first)
    return states.mT if is_tall else states
