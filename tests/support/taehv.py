"""The public architecture of TAEHV's `taew2_2`, stated once more, plainly: lists of layers and a loop.

Nothing here is taken from the package, so that what is compared with it was written down twice.
"""

import torch
from torch import nn
from torch.nn import functional as F


WIDTHS, LATENT_CHANNELS, PATCH_SIZE = (256, 128, 64, 64), 48, 2
FRAMES_OF_A_STAGE = (1, 2, 2)


class Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class WithPast(nn.Module):
    """A residual block over a frame and, as further channels, the frame before it."""

    def __init__(self, width: int):
        super().__init__()
        layers = [nn.Conv2d(2 * width, width, 3, padding=1)]
        for _ in range(2):
            layers += [nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.conv = nn.Sequential(*layers)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """`video` is [B, F, C, h, w]; before its first frame, all is zero."""
        shifted = torch.zeros_like(video)
        shifted[:, 1:] = video[:, :-1]
        pairs = zip(frames(video), frames(shifted), strict=True)
        return F.relu(torch.stack([self.conv(torch.cat(pair, dim=1)) for pair in pairs], dim=1) + video)


class MoreFrames(nn.Module):
    """Each frame becomes several, one after the other."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count, self.conv = count, nn.Conv2d(width, width * count, 1, bias=False)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        made = [part for frame in frames(video) for part in self.conv(frame).chunk(self.count, dim=1)]
        return torch.stack(made, dim=1)


def frames(video: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return video.unbind(1)


def taew2_2_decoder(
    widths: tuple[int, ...] = WIDTHS,
    latent_channels: int = LATENT_CHANNELS,
    counts: tuple[int, ...] = FRAMES_OF_A_STAGE,
) -> nn.Sequential:
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
    for width, next_width, count in zip(widths[:-1], widths[1:], counts, strict=True):
        layers += [WithPast(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), MoreFrames(width, count)]
        layers += [nn.Conv2d(width, next_width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 3 * PATCH_SIZE**2, 3, padding=1))


def taew2_2_state_dict(decoder: nn.Sequential, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a published file holds: this decoder, and an encoder, of which two layers stand for all."""
    encoder = {"encoder.0.weight": torch.randn(64, 12, 3, 3), "encoder.17.bias": torch.randn(LATENT_CHANNELS)}
    return {**encoder, **{f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}}


@torch.no_grad()
def decode_all_at_once(decoder: nn.Sequential, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, F, h, w] to pixels in [-1, 1], [B, 3, 1 + 4 (F - 1), H, W]."""
    video = latents.transpose(1, 2)
    for layer in decoder:
        if isinstance(layer, (WithPast, MoreFrames)):
            video = layer(video)
        else:
            video = torch.stack([layer(frame) for frame in frames(video)], dim=1)
    video = torch.stack([F.pixel_shuffle(frame, PATCH_SIZE) for frame in frames(video)], dim=1)
    return 2 * video[:, 3:].clamp(0, 1).transpose(1, 2) - 1
