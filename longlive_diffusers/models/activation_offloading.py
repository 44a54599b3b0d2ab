"""Gradient checkpointing whose checkpoints wait in the host's memory."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from ..host_copies import HostCopy


def checkpoint_on_host(
    run: Callable[..., torch.Tensor],
    tokens: torch.Tensor,
    *others,
    copy: Callable[[torch.Tensor], HostCopy] = HostCopy,
) -> torch.Tensor:
    """
    Run a block, keep a copy of its input in the host's memory and nothing on the device, and run it again in the
    backward. Results and gradients are those of other gradient checkpointing, to the bit.

    It is meant for `model.enable_gradient_checkpointing(checkpoint_on_host)`. The inputs of the blocks are most of
    what checkpointing leaves on the device: for the 5B model and 32 latent frames of 704x1280, 0.17 GB of each block
    in bfloat16, twice that in float32. Their copies leave a GPU while the block computes, into pinned memory; in the
    backward, each is waited for.

    Args:
        run: The block, or what runs it.
        tokens: Its input, of shape `(batch, tokens, width)`.
        others: Its other arguments. They stay where they are, since all blocks share them.
        copy: What copies `tokens` to the host.
    """
    if torch.compiler.is_compiling():  # which cannot follow what happens outside of tensors
        return checkpoint(run, tokens, *others, use_reentrant=False)
    return checkpoint(partial(_run, run, _Input(tokens, copy)), *others, use_reentrant=False)


def _run(run: Callable[..., torch.Tensor], kept: "_Input", *others) -> torch.Tensor:
    return run(kept.take(), *others)


class _Input:
    """The input of a block: at first the tensor itself, then what its copy on the host says."""

    def __init__(self, tensor: torch.Tensor, copy: Callable[[torch.Tensor], HostCopy]):
        self._tensor: torch.Tensor | None = tensor
        self._copy_to_host = copy

    def take(self) -> torch.Tensor:
        """Return the tensor the first time, and a copy of it ever after, on the same device."""
        tensor, self._tensor = self._tensor, None
        if tensor is None:
            return self._copy.fetch()
        self._copy = self._copy_to_host(tensor)
        return tensor
