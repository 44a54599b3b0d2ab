"""What the ranks of a stream exchange in a forward of one chunk.

Outside of self-attention, a token depends on itself and the prompt alone, so each rank computes its own frames of the
chunk. Self-attention needs all tokens, but no two heads of them together: before it, the ranks exchange queries, keys
and values, so that each has all tokens of its own heads, and after it they exchange what came out. (Ulysses, arXiv
2309.14509.) Hence a rank's KV cache holds its own heads of all frames, and nothing that is cached is ever sent.

    [B, tokens / N, 3, heads, head_dim]  --- scatter heads, gather tokens -->  [B, tokens, 3, heads / N, head_dim]

A chunk whose frames N does not divide (parts of chunks, when history is rewritten) is computed by every rank in full,
except for attention: each attends with its own heads, and these are gathered. Both ways fill the same cache.
"""

import torch
import torch.distributed as dist

from .all_to_all import gather_heads, gather_parts, scatter_heads


EXCHANGE_DTYPES = (None, "fp8", "nvfp4")
"""How states can be exchanged: as they are; in float8_e4m3 with a scale for each token of each head; or like that, but
the keys and values that an NVFP4 cache is to keep in NVFP4, as it keeps them."""

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


class FrameExchange:
    """
    The exchange of a chunk whose frames are split evenly: rank r has the r-th part of them.

    Args:
        group: The N ranks that share the heads.
        dtype: One of `EXCHANGE_DTYPES`.
    """

    def __init__(self, group: dist.ProcessGroup, dtype: str | None = None):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.is_compressed, self.sends_codes = dtype is not None, dtype == "nvfp4"

    def own_frames(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's frames, a view."""
        return states.chunk(self.size, dim)[self.rank]

    def all_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Gather latents `[B, C, F / N, h, w]` of all ranks to `[B, C, F, h, w]`."""
        return torch.cat(gather_parts(latents, self.group), dim=2)

    def own_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, tokens / N, ..., heads, head_dim]`, all heads of this rank's frames, to `[B, tokens, ..., heads / N,
        head_dim]`, this rank's heads of all frames."""
        return self._exchange(states, scatter_heads)

    def all_heads(self, states: torch.Tensor) -> torch.Tensor:
        """The inverse of [`own_heads`]."""
        return self._exchange(states, gather_heads)

    def own_bytes(self, packed: torch.Tensor) -> torch.Tensor:
        """`[B, frames / N, heads, n]`, bytes that stand for whole frames, to `[B, frames, heads / N, n]`."""
        return scatter_heads(packed, self.group)

    def _exchange(self, states: torch.Tensor, exchange) -> torch.Tensor:
        if not self.is_compressed:
            return exchange(states, self.group)
        return unpack_fp8(exchange(pack_fp8(states), self.group), states.dtype)


class WholeExchange:
    """The exchange of a chunk that every rank computes in full; the same methods as [`FrameExchange`]."""

    sends_codes = False

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def own_frames(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """Return all frames."""
        return states

    def all_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents: they are complete."""
        return latents

    def own_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, tokens, ..., heads, head_dim]` to `[B, tokens, ..., heads / N, head_dim]`, a view."""
        return states.chunk(self.size, -2)[self.rank]

    def all_heads(self, states: torch.Tensor) -> torch.Tensor:
        """Gather the heads of all ranks."""
        return torch.cat(gather_parts(states, self.group), dim=-2)


HeadExchange = FrameExchange | WholeExchange


def pack_fp8(states: torch.Tensor) -> torch.Tensor:
    """Round `[..., n]` to float8_e4m3 with a float32 scale for each row, and return both as bytes `[..., n + 4]`: one
    tensor is one message, and every backend can send bytes."""
    states = states.float()
    scale = states.abs().amax(-1, keepdim=True).clamp(min=1e-30) / _FP8_MAX
    codes = (states / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def unpack_fp8(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what [`pack_fp8`] packed, `[..., n]`, in `dtype`."""
    codes, scale = packed[..., :-4].contiguous(), packed[..., -4:].contiguous()
    return (codes.view(_FP8).float() * scale.view(torch.float32)).to(dtype)
