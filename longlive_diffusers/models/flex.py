"""FlexAttention, compiled where it has to be."""

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def flex_attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask | None = None
) -> torch.Tensor:
    """
    Compute attention under `mask` (None: everything is seen), `[B, tokens, heads, head_dim]`.

    On a GPU, FlexAttention is one kernel only when it is compiled: called plainly, it materializes the scores of all
    pairs of tokens, 150 GB for a clip of 32 frames of 704x1280. In code that is being compiled, it is part of that.
    """
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    kernel: Callable[..., torch.Tensor]  # its further results are returned on request only
    kernel = _compiled_flex_attention() if needs_compilation(query.device) else flex_attention
    return kernel(query, key, value, block_mask=mask).transpose(1, 2)


def needs_compilation(device: torch.device) -> bool:
    """Whether a plain call on this device would materialize all scores, at sizes where that matters."""
    return device.type != "cpu" and not torch.compiler.is_compiling()


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention, dynamic=False)
