"""Prompt embeddings between those of two prompts: the way that a blend takes.

Every position moves by itself. The network attends to all positions, and what fills a prompt up is zeros, which it was
trained to attend to like to any token. So where one prompt is longer, its further tokens grow out of these zeros, or
fade into them: no position is masked, and none appears or vanishes at once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..limits import MAX_BLEND_CHUNKS
from ..number_checks import is_count


INTERPOLATIONS = ("linear", "spherical")
NEARLY_PARALLEL = 0.9995  # the cosine beyond which an arc is a line, and its formula divides by next to nothing


def check_blend(chunks: int, interpolation: str) -> None:
    """Raise a ValueError unless a blend may last so many chunks, and take this way."""
    if not is_count(chunks) or not 1 <= chunks <= MAX_BLEND_CHUNKS:
        raise ValueError(f"`chunks` must be an integer from 1 to {MAX_BLEND_CHUNKS}, got {chunks!r}.")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"`interpolation` must be one of {INTERPOLATIONS}, got {interpolation!r}.")


def interpolate(start: torch.Tensor, end: torch.Tensor, weight: float, interpolation: str) -> torch.Tensor:
    """
    Return the embeddings at `weight` (0: `start`, 1: `end`) of the way between two, computed in float32.

    Args:
        start, end: The embeddings, `[..., L, D]`, of one dtype and device.
        weight: From 0 to 1.
        interpolation: "linear", or "spherical": each token's vector turns from one direction to the other with even
            speed, its length following. Where one is zero or both lie nearly along one line, there is no arc, and the
            way is straight.
    """
    a, b = start.float(), end.float()
    linear = a + weight * (b - a)
    if interpolation == "linear":
        return linear.to(start.dtype)
    cosine = F.cosine_similarity(a, b, dim=-1).unsqueeze(-1)  # 0 for a vector of zeros
    lengths = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    has_arc = (lengths > 0) & (cosine.abs() < NEARLY_PARALLEL)
    angle = torch.acos(torch.where(has_arc, cosine, 0))
    arc = (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
    return torch.where(has_arc, arc, linear).to(start.dtype)


@dataclass
class Blend:
    """
    A blend under way.

    Args:
        start: The embeddings that it begins from, `[B, L, D]`.
        end: Those of the new prompts, which the last chunk has as they are, `[B, L', D]`.
        chunks: How many chunks it lasts.
        interpolation: See [`interpolate`].
    """

    start: torch.Tensor
    end: torch.Tensor
    chunks: int
    interpolation: str
    chunks_begun: int = 0

    @property
    def is_over(self) -> bool:
        return self.chunks_begun == self.chunks

    def next(self) -> torch.Tensor:
        """Return the embeddings of the next chunk."""
        self.chunks_begun += 1
        if self.is_over:
            return self.end
        length = max(self.start.shape[1], self.end.shape[1])
        start, end = (F.pad(embeds, (0, 0, 0, length - embeds.shape[1])) for embeds in (self.start, self.end))
        return interpolate(start, end, self.chunks_begun / self.chunks, self.interpolation)
