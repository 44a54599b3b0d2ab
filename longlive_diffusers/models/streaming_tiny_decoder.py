"""Decode video a chunk at a time with a [`TinyVideoDecoder`], with the same result as in a single call."""

import torch

from .streaming_vae import check_next_latents
from .tiny_decoder import Memory, TinyVideoDecoder
from .video_so_far import VideoSoFar


class StreamingTinyDecoder:
    """
    The [`StreamingDecoder`] of a tiny decoder: `decode(chunk)` for the chunks of one video, in order, gives the same
    bits however the video is divided. It works on a latent frame at a time, so that memory does not depend on the
    length of a chunk.

    Args:
        decoder: The network; not changed, and free for other uses between calls.

    Raises:
        ValueError: If it is no `TinyVideoDecoder`.
    """

    def __init__(self, decoder: TinyVideoDecoder):
        if not isinstance(decoder, TinyVideoDecoder):
            raise ValueError(f"Expected a TinyVideoDecoder, got {type(decoder).__name__}.")
        self.decoder = decoder
        self.reset()

    @property
    def num_bytes(self) -> int:
        """The size of the features that are kept for the next chunk."""
        return sum(features.nbytes for features in self._memory or ())

    def reset(self) -> None:
        """Forget the video so far: the next chunk begins a new one."""
        self._memory: Memory | None = None
        self._so_far = VideoSoFar()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decode the next chunk.

        Args:
            latents: The next latent frames `[B, latent_channels, F, h, w]`, normalized, as the transformer makes them.

        Returns:
            Pixels in [-1, 1], `[B, 3, frames, H, W]`; with a temporal scale of 4, 1 + 4 (F - 1) frames for the first
            chunk, and 4 F for later ones.

        Raises:
            ValueError: For latents whose shape does not fit the network or the previous chunk.
            RuntimeError: If an error has ended the call before, and there was no `reset()` since.
        """
        channels = self.decoder.config.latent_channels
        shape = check_next_latents(latents, channels, self._so_far.shape)
        frames = []
        with self._so_far.continued(shape):
            for frame in latents.split(1, dim=2):
                pixels, self._memory = self.decoder(frame, self._memory)
                frames.append(pixels)
            return torch.cat(frames, dim=2).clamp(-1, 1)
