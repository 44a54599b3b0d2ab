"""The averaged weights of a run, in the network for a while: to make videos with them, and to save them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import FSDPModule

from longlive_diffusers import LongLiveTransformer3DModel
from run.arguments import OptimizationArguments


def average_of(parameters: list[torch.nn.Parameter], optimization: OptimizationArguments) -> EMAModel | None:
    """Begin the average of the trained weights, if one is asked for."""
    decay = optimization.ema_decay
    if decay is None:
        return None
    return EMAModel(parameters, decay=decay, min_decay=decay, update_after_step=optimization.ema_start_step)


@contextmanager
def averaged_weights(
    model: torch.nn.Module, ema: EMAModel | None, averaged: Sequence[torch.nn.Parameter] | None = None
) -> Iterator[None]:
    """Give the network its averaged weights, if an average is kept. Every process has to call this.

    Args:
        model: The network.
        ema: The average.
        averaged: The parameters that it is of; by default, all that are trained.

    FSDP keeps the weights that are not in a block gathered after a forward, for a backward. Without one, as in
    validation, they would stay: the averages would be trained on, and not the weights that are restored here.
    """
    free_gathered(model)
    trained = averaged or [parameter for parameter in model.parameters() if parameter.requires_grad]
    if ema is not None:
        ema.store(trained)
        ema.copy_to(trained)
    try:
        yield
    finally:
        free_gathered(model)
        if ema is not None:
            ema.restore(trained)


@contextmanager
def for_inference(
    accelerator: Accelerator, model: torch.nn.Module, ema: EMAModel | None
) -> Iterator[LongLiveTransformer3DModel]:
    """Yield the network of a run as it is to be used, with its averaged weights, if an average is kept. Every process
    has to call this."""
    transformer = accelerator.unwrap_model(model, keep_torch_compile=False)
    with averaged_weights(model, ema):
        try:
            yield transformer.eval()
        finally:
            transformer.train()


def free_gathered(model: torch.nn.Module) -> None:
    """Free the weights that FSDP has gathered, so that the next forward gathers them as they are then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
