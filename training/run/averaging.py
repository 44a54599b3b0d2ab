"""The averaged weights of a run, in the network for a while: to make videos with them, and to save them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import FSDPModule


@contextmanager
def averaged_weights(model: torch.nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Give the network its averaged weights, if an average is kept. Every process has to call this.

    FSDP keeps the weights that are not in a block gathered after a forward, for a backward. Without one, as in
    validation, they would stay: the averages would be trained on, and not the weights that are restored here.
    """
    _free_gathered(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if ema is not None:
        ema.store(trained)
        ema.copy_to(trained)
    try:
        yield
    finally:
        _free_gathered(model)
        if ema is not None:
            ema.restore(trained)


def _free_gathered(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
