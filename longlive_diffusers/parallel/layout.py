"""Which frames of a clip belong to which rank."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FrameLayout:
    """
    The split of one clip over the ranks of a sequence-parallel group: each has the same number of consecutive frames,
    in whole chunks (Balanced SP, arXiv 2605.18739).

    Args:
        num_frames: The number of latent frames in the clip.
        num_ranks: The number of ranks that share the clip.
        chunk_size: The number of latent frames in a chunk.

    Raises:
        ValueError: If the number of frames is not a multiple of `num_ranks * chunk_size`.
    """

    num_frames: int
    num_ranks: int
    chunk_size: int

    def __post_init__(self):
        if min(self.num_frames, self.num_ranks, self.chunk_size) < 1:
            raise ValueError(
                f"Frames, ranks and chunk size must be at least 1, got {self.num_frames}, {self.num_ranks} and "
                f"{self.chunk_size}."
            )
        unit = self.num_ranks * self.chunk_size
        if self.num_frames % unit:
            raise ValueError(
                f"{self.num_frames} latent frames cannot be split over {self.num_ranks} ranks in whole chunks of "
                f"{self.chunk_size}: {unit} does not divide {self.num_frames}."
            )

    @property
    def num_chunks(self) -> int:
        return self.num_frames // self.chunk_size

    @property
    def frames_per_rank(self) -> int:
        return self.num_frames // self.num_ranks

    @property
    def chunks_per_rank(self) -> int:
        return self.num_chunks // self.num_ranks

    def frames_of(self, rank: int) -> slice:
        """Return the latent frames of `rank`."""
        return self._part(rank, self.frames_per_rank)

    def chunks_of(self, rank: int) -> slice:
        """Return the chunks of `rank`."""
        return self._part(rank, self.chunks_per_rank)

    def shard_latents(self, latents: torch.Tensor, rank: int) -> torch.Tensor:
        """`[B, C, F, h, w]` -> the rank's `[B, C, F / N, h, w]`, a view."""
        return self._shard(latents, 2, self.num_frames, self.frames_of(rank))

    def shard_frames(self, values: torch.Tensor, rank: int) -> torch.Tensor:
        """Per-frame values `[B, F, ...]` (timesteps, positions) -> the rank's `[B, F / N, ...]`, a view."""
        return self._shard(values, 1, self.num_frames, self.frames_of(rank))

    def shard_chunks(self, values: torch.Tensor, rank: int) -> torch.Tensor:
        """Per-chunk values `[B, chunks, ...]` (prompt embeddings, a loss mask) -> the rank's `[B, chunks / N, ...]`, a
        view."""
        return self._shard(values, 1, self.num_chunks, self.chunks_of(rank))

    def _part(self, rank: int, size: int) -> slice:
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"Ranks are 0 to {self.num_ranks - 1}, got {rank}.")
        return slice(rank * size, (rank + 1) * size)

    def _shard(self, tensor: torch.Tensor, dim: int, length: int, part: slice) -> torch.Tensor:
        if tensor.ndim <= dim or tensor.shape[dim] != length:
            raise ValueError(f"Expected {length} entries in dimension {dim}, got shape {tuple(tensor.shape)}.")
        return tensor.narrow(dim, part.start, part.stop - part.start)


def check_heads(num_heads: int, num_ranks: int) -> None:
    """Raise a ValueError unless every rank gets the same number of attention heads."""
    if num_heads % num_ranks:
        raise ValueError(
            f"{num_heads} attention heads cannot be scattered over {num_ranks} ranks: {num_ranks} does not divide "
            f"{num_heads}."
        )
