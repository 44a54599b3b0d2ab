"""The learning-rate schedule of the toy's scripts."""

import torch
from torch.optim.lr_scheduler import OneCycleLR


def one_cycle(optimizer: torch.optim.Optimizer, learning_rate: float, *, steps: int, warmup: float) -> OneCycleLR:
    """
    Return a schedule that rises to a learning rate and falls to nothing.

    Args:
        optimizer: The optimizer.
        learning_rate: The largest learning rate.
        steps: The number of updates.
        warmup: The share of them in which it rises. One update is too few to rise in: torch would divide by zero.
    """
    return OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.0 if float(warmup * steps) == 1 else warmup
    )
