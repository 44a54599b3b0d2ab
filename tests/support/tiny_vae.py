"""VAEs of the two kinds of Wan, tiny."""

import torch
from diffusers import AutoencoderKLWan


def tiny_vae(z_dim: int = 8, seed: int = 0) -> AutoencoderKLWan:
    """16 times smaller in space and 4 times in time, with random weights."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.1 * i for i in range(z_dim)],
        latents_std=[1.0 + 0.05 * i for i in range(z_dim)],
    )
    return vae.eval()


def wan_2_1_vae(z_dim: int = 8, seed: int = 0) -> AutoencoderKLWan:
    """The older kind (8x in space, pixels not patchified, no residual shortcuts around its blocks), tiny."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    )
    return vae.eval()
