"""Encode only a rank's own part of a video ("SP-aware VAE encoding", LongLive-2.0, arXiv 2605.18739).

Wan's VAE is causal in time: a latent depends on its own raw frames and on those before, through features that its
convolutions hand on. Their reach is finite, and what comes from far back is weak. So a rank encodes its own frames
after a *halo*: some earlier latents, which are only there to hand on features and are then dropped.

Latent 0 stands for raw frame 0, latent l > 0 for the four raw frames 4 (l - 1) + 1 .. 4 l. The encoder takes the first
frame of whatever it is given as a latent of its own; for a halo that starts at latent a > 0, it is given raw frame
4 (a - 1), the last one of latent a - 1, in that place. The latent that is made of this frame alone (the *pseudo*
latent) is not one of the video's: it is dropped with the halo.

    raw frames      0 | 1 2 3 4 | 5 6 7 8 | 9 ...        rank's first latent 4, halo 2
    latents         0 |    1    |    2    |    3    |    4    |    5 ...
    encoded               [pseudo|   halo  |  halo   |  own    |   own ]
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan

from ..frame_counts import pixel_frames
from .layout import FrameLayout


@dataclass(frozen=True)
class RawWindow:
    """
    Raw frames `start` to `stop - 1` of a video, whose encoding begins with `num_dropped` latents to be dropped.

    Args:
        start, stop: The first raw frame, and the one after the last; there are 1 + 4 n of them.
        num_dropped: How many latents are dropped: those of the halo, and the pseudo latent before it.
    """

    start: int
    stop: int
    num_dropped: int

    @classmethod
    def of_latents(cls, first: int, last: int, halo: int) -> "RawWindow":
        """Return what to encode for latents `first` to `last - 1`, with at most `halo` latents before them."""
        if not 0 <= first < last:
            raise ValueError(f"Expected latents from 0 <= first < last, got {first} and {last}.")
        if halo < 0:
            raise ValueError(f"A halo has at least 0 latents, got {halo}.")
        halo_start = max(first - halo, 0)
        pseudo = min(halo_start, 1)  # there is nothing before latent 0
        return cls(pixel_frames(halo_start) - pseudo, pixel_frames(last), first - halo_start + pseudo)

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


def raw_window(layout: FrameLayout, rank: int, halo: int = 28) -> RawWindow:
    """
    Return the raw frames that `rank` has to read in order to encode its latents.

    Args:
        layout: The split of the clip's latent frames.
        rank: The rank in the sequence-parallel group.
        halo: How many latents before the rank's own are encoded too (28 in the paper's implementation), as far as the
            clip has them.
    """
    own = layout.frames_of(rank)
    return RawWindow.of_latents(own.start, own.stop, halo)


@torch.no_grad()
def encode_shard(
    vae: AutoencoderKLWan, frames: torch.Tensor, layout: FrameLayout, rank: int, halo: int = 28
) -> torch.Tensor:
    """
    Encode a rank's own frames; nothing is communicated.

    Args:
        vae: The VAE; its slicing or tiling is respected.
        frames: The pixels in [-1, 1]: either of the whole clip, `[B, 3, 1 + 4 (F - 1), H, W]`, or only of the rank's
            `raw_window(layout, rank, halo)`.
        layout, rank, halo: As in [`raw_window`]. The result is that of encoding the whole clip at once if the halo
            covers the reach of the encoder, and close to it otherwise.

    Returns:
        The means `[B, z_dim, F / N, h, w]`, not normalized.

    Raises:
        ValueError: If the frames are neither the whole clip's nor the rank's.
    """
    window = raw_window(layout, rank, halo)
    whole = pixel_frames(layout.num_frames)
    if frames.ndim != 5 or frames.shape[2] not in (window.num_frames, whole):
        raise ValueError(
            f"Rank {rank} of {layout.num_ranks} encodes raw frames {window.start} to {window.stop - 1} of {whole}: "
            f"expected pixels [B, 3, {window.num_frames} or {whole}, H, W], got shape {tuple(frames.shape)}."
        )
    if frames.shape[2] != window.num_frames:
        frames = frames[:, :, window.start : window.stop]
    return vae.encode(frames, return_dict=False)[0].mode()[:, :, window.num_dropped :]
