"""Pixel frames, latent frames and chunks: how many of the one are how many of the other.

Wan's VAE makes one latent frame of the first pixel frame of a video, and one of every `temporal_scale` (4) after it:

    pixel frames     0 | 1 2 3 4 | 5 6 7 8 | ...
    latent frames    0 |    1    |    2    | ...

A part of a video that does not open it has no such first frame: all of its latent frames stand for `temporal_scale`
pixel frames each. A chunk is `chunk_size` latent frames.
"""

from .number_checks import check_booleans, check_counts


TEMPORAL_SCALE = 4
"""Pixel frames of a latent frame, in all of Wan's VAEs (`vae.config.scale_factor_temporal`)."""


def pixel_frames(num_latent_frames: int, *, opens_video: bool = True, temporal_scale: int = TEMPORAL_SCALE) -> int:
    """The pixel frames that latent frames stand for; so, also, the index of the pixel frame that follows them.

    Args:
        num_latent_frames: At least 0.
        opens_video: Whether the first of them is the first of a video.
        temporal_scale: Pixel frames of every latent frame but the first of a video.

    Raises:
        ValueError: If a number is no integer or below what it can be, here as in the other functions.
    """
    check_booleans(opens_video=opens_video)
    check_counts(at_least=0, num_latent_frames=num_latent_frames)
    check_counts(temporal_scale=temporal_scale)
    return max(0, num_latent_frames * temporal_scale - (temporal_scale - 1) * opens_video)


def latent_frames(num_pixel_frames: int, *, opens_video: bool = True, temporal_scale: int = TEMPORAL_SCALE) -> int:
    """The latent frames that pixel frames fill; the inverse of [`pixel_frames`], rounded down."""
    check_booleans(opens_video=opens_video)
    check_counts(at_least=0, num_pixel_frames=num_pixel_frames)
    check_counts(temporal_scale=temporal_scale)
    return (num_pixel_frames + (temporal_scale - 1) * opens_video) // temporal_scale


def whole_chunks(
    num_pixel_frames: int, chunk_size: int, *, opens_video: bool = True, temporal_scale: int = TEMPORAL_SCALE
) -> int:
    """The chunks of `chunk_size` latent frames that pixel frames fill, rounded down."""
    check_counts(chunk_size=chunk_size)
    return latent_frames(num_pixel_frames, opens_video=opens_video, temporal_scale=temporal_scale) // chunk_size


def chunks_to_cover(num_pixel_frames: int, chunk_size: int, *, temporal_scale: int = TEMPORAL_SCALE) -> int:
    """The chunks that a video of so many pixel frames, at least 1, takes, rounded up."""
    check_counts(num_pixel_frames=num_pixel_frames, chunk_size=chunk_size, temporal_scale=temporal_scale)
    chunk_frames = chunk_size * temporal_scale
    return -(-(num_pixel_frames + temporal_scale - 1) // chunk_frames)
