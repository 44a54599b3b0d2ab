"""Decode and encode video a chunk at a time, in constant memory, with the same result as in a single call.

Wan's VAE is causal in time: each convolution needs the last frames of its own input, nothing later. `vae.decode` keeps
these in a feature cache, but clears it at the start and end of every call. Here the caller's object owns the cache, so
that it lives from chunk to chunk. The first latent frame gives one pixel frame, every later one four.

What diffusers' decoder does is computed from its parameters with fewer and faster operations (`wan_decoder/`). A
decoder that is not quite diffusers' own is called as it is; so is the encoder.

With a group of ranks, each works on its own columns of the picture, and keeps the features of these only
(`wan_decoder/beside.py`; `parallel/halo.py`, where modules are called).
"""

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..frame_counts import latent_frames, pixel_frames
from ..fused.layers import is_compiled_in_place
from ..parallel.columns import ColumnSplit, check_group
from ..parallel.halo import exchanging_halos
from ..tensor_checks import check_floats
from .compiled import compiled_for
from .video_so_far import VideoSoFar
from .wan_decoder.cached_convolutions import frames_at_once
from .wan_decoder.decode_frames import decode_frames
from .wan_decoder.history import from_feature_cache, into_feature_cache
from .wan_decoder.published_modules import is_as_published


FRAMES_AT_ONCE = 4  # latent frames that are decoded in one call at most: memory grows with them
ROUNDING = 1e-2  # what pixels may be beyond [-1, 1]: two steps of bfloat16 there


class StreamingDecoder:
    """
    `decode(chunk)` for the chunks of one video, in order, gives what `vae.decode` gives for all of them at once; also
    with `vae.enable_slicing()` and `vae.enable_tiling()`. In float32, pixels are the same within 1e-5. In 16 bits they
    are rounded less often than by `vae.decode`, and as close to those of float32 (root mean square).

    The parameters of `vae.decoder` are read at every call. It is called, frame by frame, if it does more than its
    parameters say: if a module in it has hooks (as offloading by layers or groups has) or was replaced, subclassed or
    wrapped, by LoRA or `torch.compile` for example. `vae.decoder.compile()` has what is computed here compiled
    instead, with torch's default settings: for each size, one graph for the first frame, and one for each number of
    latent frames at once (1 to 4).

    Args:
        vae: An `AutoencoderKLWan`; not changed, and free for other uses between calls.
        group: Ranks that decode together, each some columns of the picture: all call `decode` with the same latents,
            and all get all pixels, those of a single process but for rounding. Latents with fewer columns (and rows)
            than there are ranks, and those that are decoded in tiles, are decoded by every rank for itself. A thread
            that decodes while another one communicates needs a group of its own.

    Raises:
        ValueError: If this process is not in the group.
    """

    def __init__(self, vae: AutoencoderKLWan, group: dist.ProcessGroup | None = None):
        self.vae, self._group = _check_vae(vae), check_group(group)
        self.reset()

    @property
    def num_bytes(self) -> int:
        """The size of the features that are kept for the next chunk, on this rank."""
        return sum(_num_bytes(cache) for cache in self._caches.values())

    def reset(self) -> None:
        """Forget the video so far: the next chunk begins a new one."""
        self._caches: dict[tuple[int, int, int], list] = {}
        self._so_far, self._pieces = VideoSoFar(), None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decode the next chunk.

        Args:
            latents: The next latent frames `[B, z_dim, F, h, w]`, as `vae.decode` takes them (not normalized).

        Returns:
            Pixels in [-1, 1], `[B, 3, frames, H, W]`; 1 + 4 (F - 1) frames for the first chunk, 4 F for later ones.

        Raises:
            ValueError: For latents whose shape does not fit the network or the previous chunk, or if slices or tiles
                were switched since.
            RuntimeError: If an error has ended the call before, and there was no `reset()` since.
        """
        before = self._so_far.shape
        shape = check_next_latents(latents, self.vae.config.z_dim, before)
        pieces = self._describe_pieces(shape)
        if before is not None and pieces != self._pieces:
            raise ValueError(
                f"The video so far was decoded {self._pieces}, this chunk would be {pieces}: `reset()` first."
            )
        self._pieces = pieces
        with self._so_far.continued(shape) as first:
            _bring_to_device(self.vae)
            if self.vae.use_slicing and latents.shape[0] > 1:
                return torch.cat([self._decode_slice(part, i, first) for i, part in enumerate(latents.split(1))])
            return self._decode_slice(latents, 0, first)

    def _describe_pieces(self, shape: tuple[int, ...]) -> str:
        """Say of what latents (B, h, w) are decoded: what is kept for the next chunk is kept for each such piece."""
        vae, (batch, height, width) = self.vae, shape
        by_video = ", each video by itself" if vae.use_slicing and batch > 1 else ""
        if not self._is_tiled(height, width):
            return f"whole{by_video}"
        size = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        step = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
        return f"in tiles of {size} pixels, one every {step}{by_video}"

    def _is_tiled(self, height: int, width: int) -> bool:
        vae, ratio = self.vae, self.vae.spatial_compression_ratio
        fits = height <= vae.tile_sample_min_height // ratio and width <= vae.tile_sample_min_width // ratio
        return vae.use_tiling and not fits

    def _decode_slice(self, latents: torch.Tensor, slice_index: int, first: bool) -> torch.Tensor:
        vae, (height, width) = self.vae, latents.shape[-2:]
        ratio = vae.spatial_compression_ratio
        tile_height, tile_width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
        tiled = self._is_tiled(height, width)
        split = ColumnSplit.of_latents(height, width, None if tiled else self._group)
        if tiled:
            pixels = self._decode_tiles(latents, slice_index, first, tile_height, tile_width, split)
        else:
            own = split.part(latents)
            with exchanging_halos(split):
                own = vae.post_quant_conv(own)
            pixels = self._decode_tile(own, (slice_index, 0, 0), first, split)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return split.gather(torch.clamp(pixels, min=-1.0, max=1.0))

    def _decode_tile(
        self, latents: torch.Tensor, key: tuple[int, int, int], first: bool, split: ColumnSplit
    ) -> torch.Tensor:
        """Decode with the feature cache of this slice and tile."""
        cache = self._caches.setdefault(key, [None] * self.vae._cached_conv_counts["decoder"])
        if is_as_published(self.vae.decoder):
            frames = self._compute(latents, cache, first, None if split.is_whole else split)
        else:
            with exchanging_halos(split):
                frames = self._call_decoder(latents, cache, first)
        return frames[0] if len(frames) == 1 else torch.cat(frames, dim=2)

    def _call_decoder(self, latents: torch.Tensor, cache: list, first: bool) -> list[torch.Tensor]:
        """Call the module, with one latent frame after the other."""
        return [
            self.vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=first and index == 0)
            for index, frame in enumerate(latents.split(1, dim=2))
        ]

    def _compute(
        self, latents: torch.Tensor, cache: list, first: bool, split: ColumnSplit | None
    ) -> list[torch.Tensor]:
        """Compute what the module would, several latent frames at once but for the first of a video."""
        decoder, (batch, _, count, *size) = self.vae.decoder, latents.shape
        is_compiled = is_compiled_in_place(decoder) and split is None  # a compiler does not follow what ranks exchange
        if split is not None:  # as many frames on every rank: the widest part, with its neighbors' columns, has to fit
            size[split.axis] = max(split.columns) + 2
        most = frames_at_once(decoder, batch, *size, most=FRAMES_AT_ONCE)
        lengths = [1] * first + [most] * ((count - first) // most)
        kept, decoded = from_feature_cache(decoder, cache, latents), []
        for frames in latents.tensor_split(list(accumulate(lengths)), dim=2):
            if frames.shape[2]:
                # With strides that do not tell the chunk's length, which would be others to a compiler.
                frames = frames.clone(memory_format=torch.contiguous_format)
                decode = compiled_for(decode_frames, frames.shape) if is_compiled else decode_frames
                result, kept = decode(decoder, frames, kept, first and not decoded, split)
                decoded.append(result)
        into_feature_cache(kept, cache)
        return decoded

    def _decode_tiles(
        self, latents, slice_index: int, first: bool, tile_height: int, tile_width: int, undivided: ColumnSplit
    ) -> torch.Tensor:
        """Decode overlapping tiles and blend their seams, with the sizes and blending of `vae.tiled_decode`."""
        vae, (height, width) = self.vae, latents.shape[-2:]
        ratio, patch = vae.spatial_compression_ratio, vae.config.patch_size or 1
        step_height, step_width = vae.tile_sample_stride_height // ratio, vae.tile_sample_stride_width // ratio
        keep_height, keep_width = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
        blend_height = vae.tile_sample_min_height // patch - keep_height
        blend_width = vae.tile_sample_min_width // patch - keep_width
        if patch == 1:
            blend_height = vae.tile_sample_min_height - keep_height
            blend_width = vae.tile_sample_min_width - keep_width

        rows = []
        for top in range(0, height, step_height):
            row = []
            for left in range(0, width, step_width):
                tile = latents[..., top : top + tile_height, left : left + tile_width]
                # Frame by frame, like `tiled_decode`: the last bit can depend on the number of frames.
                tile = torch.cat([vae.post_quant_conv(frame) for frame in tile.split(1, dim=2)], dim=2)
                row.append(self._decode_tile(tile, (slice_index, top, left), first, undivided))
            rows.append(row)
        blended = []
        for i, row in enumerate(rows):
            parts = []
            for j, tile in enumerate(row):
                if i > 0:
                    tile = vae.blend_v(rows[i - 1][j], tile, blend_height)
                if j > 0:
                    tile = vae.blend_h(row[j - 1], tile, blend_width)
                parts.append(tile[..., :keep_height, :keep_width])
            blended.append(torch.cat(parts, dim=-1))
        pixels = torch.cat(blended, dim=-2)
        return pixels[..., : height * ratio // patch, : width * ratio // patch]


class StreamingEncoder:
    """
    `encode(frames)` for the frames of one video, in order, gives the means that `vae.encode` gives for all of them at
    once, bit for bit. (Slicing gives the same; tiling is for `vae.encode` alone.)

    Args:
        vae: An `AutoencoderKLWan`; not changed.
        group: Ranks that encode together, each some columns of the picture: all call `encode` with the same pixels,
            and all get all latents. Pictures of fewer latent columns (and rows) than there are ranks are encoded by
            every rank for itself.

    Raises:
        ValueError: If this process is not in the group.
    """

    def __init__(self, vae: AutoencoderKLWan, group: dist.ProcessGroup | None = None):
        self.vae, self._group = _check_vae(vae), check_group(group)
        self.reset()

    @property
    def num_bytes(self) -> int:
        """The size of the features that are kept for the next frames, on this rank."""
        return _num_bytes(self._cache)

    def reset(self) -> None:
        """Forget the video so far."""
        self._cache = [None] * self.vae._cached_conv_counts["encoder"]
        self._so_far = VideoSoFar()

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """
        Encode the next frames.

        Args:
            frames: Pixels in [-1, 1], `[B, 3, frames, H, W]`: 1 + 4 n frames in the first call, 4 n in later ones.

        Returns:
            Latents `[B, z_dim, F, h, w]`, not normalized; one for the first frame and one for each four after it.

        Raises:
            ValueError: For another number of frames (the message states which would do), or for pixels whose shape
                does not fit the network or the previous frames.
            RuntimeError: If an error has ended the call before, and there was no `reset()` since.
        """
        vae, before, scale = self.vae, self._so_far.shape, self.vae.config.scale_factor_temporal
        opens_video = before is None
        channels = vae.config.in_channels // (vae.config.patch_size or 1) ** 2
        if frames.ndim != 5 or frames.shape[1] != channels:
            raise ValueError(f"Expected pixels [B, {channels}, frames, H, W], got shape {tuple(frames.shape)}.")
        count, shape = frames.shape[2], (frames.shape[0], *frames.shape[-2:])
        if before not in (None, shape):
            raise ValueError(f"The video so far has (batch, H, W) = {before}, these frames {shape}: `reset()` first.")
        num_latents = latent_frames(count, opens_video=opens_video, temporal_scale=scale)
        if count < 1 or count != pixel_frames(num_latents, opens_video=opens_video, temporal_scale=scale):
            raise ValueError(f"Expected {'1 + ' if opens_video else ''}{scale} n frames, got {count}.")
        ratio = vae.spatial_compression_ratio
        # An axis that is no whole number of latents is not split.
        split = ColumnSplit.of_latents(*(size // ratio if size % ratio == 0 else 0 for size in shape[1:]), self._group)
        frames = split.part(frames)
        if vae.config.patch_size is not None:
            frames = patchify(frames, patch_size=vae.config.patch_size)
        groups = groups_of_latents(frames, opens_video, scale)
        with self._so_far.continued(shape):
            _bring_to_device(vae)
            with exchanging_halos(split):
                encoded = [vae.encoder(group, feat_cache=self._cache, feat_idx=[0]) for group in groups]
                moments = vae.quant_conv(torch.cat(encoded, dim=2))
            return split.gather(moments.chunk(2, dim=1)[0])


def check_next_latents(latents: torch.Tensor, channels: int, before: tuple[int, ...] | None) -> tuple[int, ...]:
    """
    Check the latents that a streaming decoder is given next.

    Args:
        latents: The latents, `[B, channels, F, h, w]`.
        channels: The number of channels that the network decodes.
        before: What this returned for the chunk before; None at the beginning of a video.

    Returns:
        What the chunks of a video have in common, (B, h, w).

    Raises:
        ValueError: For latents whose shape does not fit the network or the chunk before.
    """
    if not isinstance(latents, torch.Tensor):
        raise ValueError(f"Expected latents [B, {channels}, F >= 1, h, w], got {type(latents).__name__}.")
    if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
        raise ValueError(f"Expected latents [B, {channels}, F >= 1, h, w], got shape {tuple(latents.shape)}.")
    if not latents.is_floating_point():
        raise ValueError(f"Expected latents of floats, got {latents.dtype}.")
    shape = (latents.shape[0], *latents.shape[-2:])
    if before not in (None, shape):
        raise ValueError(f"The video so far has (batch, h, w) = {before}, this chunk {shape}: `reset()` first.")
    return shape


def groups_of_latents(frames: torch.Tensor, opens_video: bool, temporal_scale: int) -> list[torch.Tensor]:
    """Split pixel frames `[B, 3, frames, H, W]` into those of each latent frame: one for the first of a video,
    `temporal_scale` for every other; they are views."""
    num_latents = latent_frames(frames.shape[2], opens_video=opens_video, temporal_scale=temporal_scale)
    borders = [
        pixel_frames(index, opens_video=opens_video, temporal_scale=temporal_scale) for index in range(num_latents + 1)
    ]
    return [frames[:, :, start:stop] for start, stop in pairwise(borders)]


@torch.no_grad()
def encode_video(
    vae: AutoencoderKLWan,
    pixels: torch.Tensor,
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """
    Encode a complete video frame by frame, in memory that does not depend on its length.

    Args:
        vae: The VAE that encodes.
        pixels: The video in [-1, 1], `[B, 3, 1 + 4 n, H, W]`, on any device.
        device: The device to encode on; by default that of the VAE.
        group: Ranks that encode the video together, as in [`StreamingEncoder`].

    Returns:
        Normalized latents `[B, z_dim, 1 + n, h, w]`, float32.

    Raises:
        ValueError: For pixels of another shape, another number of frames, or values that are no floats in [-1, 1]; H
            and W are multiples of the VAE's `scale_factor_spatial`.
    """
    encoder = StreamingEncoder(vae, group)
    _check_pixels(vae, pixels)
    groups = groups_of_latents(pixels, True, vae.config.scale_factor_temporal)
    dtype = vae.dtype  # found by going through all its modules
    latents = [encoder.encode(group.to(device or vae.device, dtype)) for group in groups]
    return normalize_latents(vae, torch.cat(latents, dim=2).float())


def _check_pixels(vae: AutoencoderKLWan, pixels: torch.Tensor) -> None:
    scale, multiple = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    channels = vae.config.in_channels // (vae.config.patch_size or 1) ** 2
    if isinstance(pixels, torch.Tensor):
        check_floats("The video to encode", pixels)
    shape = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 5 or pixels.shape[1] != channels or 0 in pixels.shape:
        raise ValueError(f"Expected pixels [B, {channels}, 1 + {scale} n, H, W], got {shape}.")
    frames, height, width = pixels.shape[2:]
    if frames % scale != 1 % scale or height % multiple or width % multiple:
        raise ValueError(f"Expected 1 + {scale} n frames of multiples of {multiple} pixels, got {shape}.")
    least, most = pixels.min(), pixels.max()
    # Not a number is not within them either.
    if not (least >= -1 - ROUNDING and most <= 1 + ROUNDING):
        raise ValueError(f"Expected floats in [-1, 1], got {pixels.dtype} in [{least.item()}, {most.item()}].")


def latent_statistics(
    vae: AutoencoderKLWan, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and standard deviation of the VAE's latents, `[1, z_dim, 1, 1, 1]`. On a GPU this waits for the
    device: keep them for as long as they are needed."""
    mean, std = (
        torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def normalize_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Normalize latents `[B, z_dim, F, h, w]` of the VAE for the transformer."""
    mean, std = latent_statistics(vae, latents.device, latents.dtype)
    return (latents - mean) / std


def _num_bytes(cache: list) -> int:
    """Of the tensors among the entries, which may also be None or a mark of diffusers'."""
    return sum(features.nbytes for features in cache if isinstance(features, torch.Tensor))


@apply_forward_hook
def _bring_to_device(vae: AutoencoderKLWan) -> None:
    """Run the hook of an offloaded VAE: calling its parts directly, as is done here, does not run it."""


def _check_vae(vae) -> AutoencoderKLWan:
    if not isinstance(vae, AutoencoderKLWan):
        raise ValueError(f"Streaming needs an AutoencoderKLWan, got {type(vae).__name__}.")
    return vae
