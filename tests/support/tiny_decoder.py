"""Tiny decoders that are tinier, with random weights."""

import torch

from longlive_diffusers import TinyVideoDecoder


def small_decoder(seed: int = 0, **config) -> TinyVideoDecoder:
    """For latents of 8 channels, 16 times smaller in space and 4 times in time, unless asked for otherwise."""
    torch.manual_seed(seed)
    small = {"latent_channels": 8, "block_out_channels": (16, 12, 8, 8), "layers_per_block": 1}
    return TinyVideoDecoder(**{**small, **config}).eval()
