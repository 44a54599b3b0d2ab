"""A tiny causal decoder that stands in for the VAE's: other pixels, at a small part of the work.

The architecture is that of TAEHV's decoders (https://github.com/madebyollin/taehv), whose `taew2_2` is trained for the
latents of Wan2.2's 5B model. All convolutions are of single frames. What a frame knows of the past comes from memory
blocks, each of which sees its own input of the frame before; so chunk after chunk needs one frame of each block's
input, and nothing else, to go on as if the video were decoded at once.

It differs from the VAE's decoder in what it takes and gives: latents are *normalized*, as the transformer makes them.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from ..loaders.diffusers_models import check_all_weights_loaded
from ..loaders.tiny_decoder import load_original_tiny_decoder
from ..number_checks import check_booleans, check_counts
from ..setting_types import check_setting_types


OUT_CHANNELS = 3  # red, green, blue
Memory = list[torch.Tensor]
"""The last frame of each memory block's input, `[B, C, h, w]`, in the order of the blocks."""


class MemoryBlock(nn.Module):
    """A residual block of three convolutions, the first of which also sees the block's input of the frame before."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, hidden_states: torch.Tensor, last_frame: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `[B, F, C, h, w]`.
            last_frame: The input's frame before these, `[B, C, h, w]`; None at the beginning of a video.

        Returns:
            The output, and the frame to pass as `last_frame` next.
        """
        if last_frame is None:
            last_frame = torch.zeros_like(hidden_states[:, 0])
        past = torch.cat([last_frame.unsqueeze(1), hidden_states[:, :-1]], dim=1)
        residual = F.relu(self.conv1(torch.cat([hidden_states, past], dim=2).flatten(0, 1)))
        residual = self.conv3(F.relu(self.conv2(residual))).view_as(hidden_states)
        # A copy: a view would keep all frames in memory.
        return F.relu(hidden_states + residual), hidden_states[:, -1].clone()


class UpsamplingStage(nn.Module):
    """Memory blocks, and then twice the frames, the height and the width, or some of these."""

    def __init__(self, channels: int, out_channels: int, num_blocks: int, *, time_upscale: bool, space_upscale: bool):
        super().__init__()
        self.time_scale, self.space_scale = 1 + time_upscale, 1 + space_upscale
        self.blocks = nn.ModuleList(MemoryBlock(channels) for _ in range(num_blocks))
        self.time_conv = nn.Conv2d(channels, self.time_scale * channels, 1, bias=False)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)

    def forward(self, hidden_states: torch.Tensor, memory: Memory | None) -> tuple[torch.Tensor, Memory]:
        """Take `[B, F, C, h, w]` to `[B, F', C', h', w']`, and return the memory of the blocks beside it."""
        last_frames = []
        for index, block in enumerate(self.blocks):
            hidden_states, last_frame = block(hidden_states, None if memory is None else memory[index])
            last_frames.append(last_frame)
        batch_size = len(hidden_states)
        # A convolution of single pixels: it may as well come before they are repeated.
        hidden_states = self.time_conv(hidden_states.flatten(0, 1)).unflatten(1, (self.time_scale, -1)).flatten(0, 1)
        if self.space_scale > 1:
            hidden_states = F.interpolate(hidden_states, scale_factor=float(self.space_scale), mode="nearest")
        return self.conv_out(hidden_states).unflatten(0, (batch_size, -1)), last_frames


class TinyVideoDecoder(ModelMixin, ConfigMixin):
    r"""
    A tiny causal video decoder. The defaults are the decoder of `taew2_2`, for Wan2.2's latents: 16x16 pixels and
    4 frames to a latent.

    A latent frame becomes `temporal_scale` frames, the last of which are those that it stands for: of a video's first
    latent frame, that is one, and those before it are dropped.

    Args:
        latent_channels: The number of channels of the latents.
        block_out_channels: The width of each stage, and at the end that of the last convolution's input.
        layers_per_block: The number of memory blocks of a stage.
        time_upscale, space_upscale: Whether each stage doubles the frames, and height and width.
        patch_size: The height and width of the square of pixels that the last convolution makes of each place.

    Raises:
        ValueError: For numbers that are not at least 1, and lists that are not as long as there are stages.
    """

    config: Any  # diffusers' FrozenDict, whose entries are also attributes

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 48,
        block_out_channels: tuple[int, ...] = (256, 128, 64, 64),
        layers_per_block: int = 3,
        time_upscale: tuple[bool, ...] = (False, True, True),
        space_upscale: tuple[bool, ...] = (True, True, True),
        patch_size: int = 2,
    ):
        super().__init__()
        check_config(self.config)
        self.temporal_scale = 2 ** sum(time_upscale)
        self.spatial_scale = patch_size * 2 ** sum(space_upscale)
        self.conv_in = nn.Conv2d(latent_channels, block_out_channels[0], 3, padding=1)
        self.stages = nn.ModuleList(
            UpsamplingStage(
                block_out_channels[index],
                block_out_channels[index + 1],
                layers_per_block,
                time_upscale=time_upscale[index],
                space_upscale=space_upscale[index],
            )
            for index in range(len(time_upscale))
        )
        self.conv_out = nn.Conv2d(block_out_channels[-1], OUT_CHANNELS * patch_size**2, 3, padding=1)

    def forward(self, latents: torch.Tensor, memory: Memory | None = None) -> tuple[torch.Tensor, Memory]:
        """
        Decode the next latent frames of a video, all at once.

        Args:
            latents: Normalized latents `[B, latent_channels, F, h, w]`.
            memory: What the call for the frames before returned; None where these open the video.

        Returns:
            Pixels `[B, 3, frames, H, W]`, in [-1, 1] but for the network's errors: 1 + temporal_scale (F - 1) frames
            where they open the video, else temporal_scale F. And the memory for the next call.
        """
        opens_video, num_blocks = memory is None, self.config.layers_per_block
        hidden_states = latents.transpose(1, 2)
        hidden_states = 3 * torch.tanh(hidden_states / 3)  # no latent is far from what the network was trained with
        hidden_states = F.relu(self.conv_in(hidden_states.flatten(0, 1))).unflatten(0, hidden_states.shape[:2])
        next_memory: Memory = []
        for index, stage in enumerate(self.stages):
            own = None if memory is None else memory[index * num_blocks : (index + 1) * num_blocks]
            hidden_states, last_frames = stage(hidden_states, own)
            next_memory += last_frames
        if opens_video:
            hidden_states = hidden_states[:, self.temporal_scale - 1 :]
        pixels = self.conv_out(F.relu(hidden_states).flatten(0, 1))
        pixels = F.pixel_shuffle(pixels, self.config.patch_size).unflatten(0, hidden_states.shape[:2])
        return 2 * pixels.transpose(1, 2) - 1, next_memory

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, output_loading_info: bool = False, **kwargs) -> Any:
        """
        Load the decoder like diffusers does.

        Raises:
            ValueError: If weights are missing or left over, about which diffusers only warns, or the path is that of a
                single file.
        """
        check_booleans(output_loading_info=output_loading_info)
        source = pretrained_model_name_or_path
        if os.path.isfile(source):
            raise ValueError(f"'{source}' is a single file: open it with {cls.__name__}.from_original.")
        loaded: Any = super().from_pretrained(source, output_loading_info=True, **kwargs)
        model, info = loaded
        check_all_weights_loaded(info, model, source)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_original(
        cls, path_or_state_dict, *, torch_dtype: torch.dtype | None = None, **config: Any
    ) -> "TinyVideoDecoder":
        """
        Load a file of TAEHV, such as `taew2_2.pth` or `taew2_2.safetensors`; its encoder is left out.

        Args:
            path_or_state_dict: The path of the file, or its state dict.
            torch_dtype: The dtype of the weights; as stored by default.
            **config: Settings that the shapes of the weights do not show, such as `time_upscale`.

        Raises:
            ValueError: If the file cannot be read, or is not of such a network.
        """
        return load_original_tiny_decoder(path_or_state_dict, cls, torch_dtype=torch_dtype, **config)


def check_config(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for settings of a wrong type or that no network can have."""
    check_setting_types(config, TinyVideoDecoder)
    check_counts(**{name: config[name] for name in ("latent_channels", "layers_per_block", "patch_size")})
    widths, times, spaces = (config[name] for name in ("block_out_channels", "time_upscale", "space_upscale"))
    if min(widths, default=0) < 1:
        raise ValueError(f"`block_out_channels` must be integers of at least 1, got {tuple(widths)}.")
    if not len(widths) - 1 == len(times) == len(spaces):
        raise ValueError(
            f"`time_upscale` and `space_upscale` must have one value less than `block_out_channels` has, got "
            f"{len(times)} and {len(spaces)} for {len(widths)}."
        )
