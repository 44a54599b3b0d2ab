"""What a decoder's causal convolutions keep of the frames before, to see it with the next ones."""

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

from .cached_convolutions import KEPT, CachedConvolution, cached_convolutions
from .norm_silu import last_frames, norm_silu_after
from .pending_sum import PendingSum


Tensor = torch.Tensor


class History:
    """
    The kept frames of all convolutions, while the decoder runs once. Convolutions take them in their order.

    Args:
        before: For each convolution the last two frames of its input so far, `[B, 2, H, W, C]`; zeros for those before
            the video. The list is emptied, so that each is freed when the convolution keeps others: they are large.

    `after` has the same for the next call.
    """

    def __init__(self, before: list[Tensor]):
        self._before, self.after = before, []

    def put_before(self, frames: Tensor) -> Tensor:
        """Return a convolution's input `[B, 2 + T, H, W, C]`: the kept frames, and these."""
        joined = torch.cat([self._before.pop(0), frames], dim=1)
        self.after.append(last_frames(joined))
        return joined

    def put_before_normalized(self, features: PendingSum, gamma: Tensor, adds_up: bool = False) -> Tensor:
        """The same after RMS norm and SiLU of these features, which may be added up for somebody else, too."""
        joined, kept = norm_silu_after(self._before.pop(0), features, gamma, adds_up)
        self.after.append(kept)
        return joined

    def pass_by(self) -> None:
        """Leave out a convolution: it keeps what it has."""
        self.after.append(self._before.pop(0))


def from_feature_cache(decoder: WanDecoder3d, cache: list, latents: Tensor) -> list[Tensor]:
    """
    Take what convolutions keep out of a feature cache, as diffusers' modules or `into_feature_cache` leave it. Nothing
    stays there, as it would not be freed.

    Args:
        decoder: The decoder.
        cache: An entry for each convolution: the last frames of its input, `[B, C, 1 or 2, H, W]`; None or "Rep" for a
            convolution that has not run yet.
        latents: The next latents, `[B, C, T, H, W]`.
    """

    def kept(convolution: CachedConvolution, entry) -> Tensor:
        (batch, _, _, height, width), scale = latents.shape, convolution.scale
        # In the dtype that the decoder has now: it may have been converted since.
        frames = entry.movedim(1, -1).to(latents.dtype) if isinstance(entry, Tensor) else latents.new_empty(0)
        if isinstance(entry, Tensor) and entry.shape[2] == KEPT:
            return frames
        shape = (batch, KEPT, scale * height, scale * width, convolution.module.in_channels)
        filled = latents.new_zeros(shape)
        if isinstance(entry, Tensor):
            filled[:, -entry.shape[2] :] = frames
        return filled

    convolutions = cached_convolutions(decoder)
    taken = [kept(convolution, entry) for convolution, entry in zip(convolutions, cache, strict=False)]
    cache[:] = [None] * len(cache)
    return taken


def into_feature_cache(history: Sequence[Tensor], cache: list) -> None:
    """Leave what convolutions keep in a feature cache, where diffusers' modules find it, too."""
    for index, frames in enumerate(history):
        cache[index] = frames.movedim(-1, 1)
