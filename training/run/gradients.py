"""Gradients of parameters that neither DDP nor FSDP looks after."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn


BUCKET = 2**26  # elements that are reduced together


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """
    Average gradients over all processes, where FSDP has not done so. Every process has to call this.

    DDP would do it in the backward, but not here: it takes the parameters of one forward for those of every forward,
    whereas only one of two LoRAs is in use at a time, and a roll-out has many forwards.
    """
    if accelerator.num_processes == 1 or accelerator.is_fsdp2:
        return
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.numel()
        if size >= BUCKET:
            _average(accelerator, bucket)
            bucket, size = [], 0
    if bucket:
        _average(accelerator, bucket)


def _average(accelerator: Accelerator, gradients: list[torch.Tensor]) -> None:
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))
