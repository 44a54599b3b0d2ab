"""FlexAttention, compiled where it has to be."""

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .compiled import compiled_for


def flex_attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask | None = None
) -> torch.Tensor:
    """
    Compute attention under `mask` (None: everything is seen), `[B, tokens, heads, head_dim]`.

    On a GPU, FlexAttention is one kernel only when it is compiled: called plainly, it materializes the scores of all
    pairs of tokens, 150 GB for a clip of 32 frames of 704x1280. In code that is being compiled, it is part of that.
    """
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    compiles = needs_compilation(query.device)
    kernel = compiled_for(_attend, (query.shape, key.shape)) if compiles else _attend
    return kernel(query, key, value, mask).transpose(1, 2)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask | None) -> torch.Tensor:
    attend: Callable[..., torch.Tensor] = flex_attention  # its further results are returned on request only
    return attend(query, key, value, block_mask=mask)


def needs_compilation(device: torch.device) -> bool:
    """Whether a plain call on this device would materialize all scores, at sizes where that matters."""
    return device.type != "cpu" and not torch.compiler.is_compiling()
