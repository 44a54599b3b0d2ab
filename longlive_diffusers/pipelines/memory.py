"""Whether what a request asks for fits into memory, found out before any work begins.

On a GPU, an allocation that does not fit is an error. On a CPU it succeeds, and the process is killed without a word
when the memory is used, which may be minutes later.
"""

import psutil
import torch

from ..frame_counts import pixel_frames
from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..wording import counted
from .chunk_step import is_guided
from .inputs import ModelSizes, Request


GIB = 2**30
ADVICE = (
    "What takes less memory: a smaller `window_size`, `height` and `width`, fewer videos at once, "
    '`kv_cache_dtype="nvfp4"` or "fp8", and on a GPU `pipe.enable_model_cpu_offload()`.'
)


class MemoryShortage(ValueError):
    """What is asked for does not fit into the memory that is free; it may when something else has ended."""


def available_bytes(device: torch.device) -> int | None:
    """The memory that can still be used; None where an allocation that does not fit is an error by itself."""
    return psutil.virtual_memory().available if device.type == "cpu" else None


def check_caches_fit(
    transformer: LongLiveTransformer3DModel, request: Request, text_length: int, device: torch.device
) -> None:
    """Raise a MemoryShortage that states the numbers, if the KV caches of a request do not fit, or the keys and values
    of its prompts, of `text_length` tokens each."""
    available = available_bytes(device)
    if available is None:
        return
    needed = cache_bytes(transformer, request, text_length)
    if needed > available:
        batch, _, _, height, width = request.latent_shape
        raise MemoryShortage(
            f"The KV cache of {batch} x {cached_frames(request)} latent frames of {height}x{width}, with prompts of "
            f"{text_length} tokens, needs {-(-needed // GIB)} GiB; {available // GIB} GiB are available. {ADVICE}"
        )


def cached_frames(request: Request) -> int:
    """The number of latent frames that the KV cache of a video holds at most."""
    if request.num_chunks is None:
        return request.window_size
    return min(request.window_size, request.num_chunks * request.chunk_size)


def cache_bytes(transformer: LongLiveTransformer3DModel, request: Request, text_length: int) -> int:
    """The memory of the KV caches of a request, and of the keys and values of its prompts of `text_length` tokens."""
    batch, _, _, height, width = request.latent_shape
    config, frames = transformer.config, cached_frames(request)
    tokens = (height // config.patch_size[1]) * (width // config.patch_size[2])
    inner_dim = config.num_attention_heads * config.attention_head_dim
    key_bytes = config.num_layers * inner_dim * transformer.dtype.itemsize  # of a token, in all layers
    text_bytes = text_length * (2 * key_bytes + config.text_dim * transformer.dtype.itemsize)
    frame_bytes = frames * bytes_per_token(transformer, request) + unrotated_frames(request) * key_bytes
    has_split_branches = transformer.stream_ranks is not None and transformer.stream_ranks.branch is not None
    num_caches = 2 if is_guided(request.guidance_scale) and not has_split_branches else 1
    return batch * num_caches * (tokens * frame_bytes + text_bytes)


def unrotated_frames(request: Request) -> int:
    """Of how many frames the keys are kept once more, unrotated: of those that relative positions move."""
    forgets = request.num_chunks is None or request.num_chunks * request.chunk_size > request.window_size
    pins = min(request.sink_size, request.chunk_size) if request.multi_shot_sink else 0
    return request.sink_size + 2 * pins + 1 if request.relative_rope and forgets else 0


def bytes_per_token(transformer: LongLiveTransformer3DModel, request: Request) -> int:
    """The memory of a token in the caches of all layers, rounded up; measured on a cache that takes no memory."""
    side, (_, patch_height, patch_width) = 16, transformer.config.patch_size
    cache = transformer.create_kv_cache(
        1,
        side * patch_height,
        side * patch_width,
        window_size=request.window_size,
        sink_size=request.sink_size,
        multi_shot_sink=request.multi_shot_sink,
        num_frames=1,
        dtype=request.kv_cache_dtype,
        device="meta",
    )
    return -(-cache.num_bytes // side**2)


def check_result_fits(request: Request, sizes: ModelSizes, output_type: str, device: torch.device) -> None:
    """Raise a MemoryShortage that states the numbers, if a whole video does not fit into the memory of `device`, where
    it is put together: for a moment, its chunks and the whole are there."""
    available = available_bytes(device)
    if available is None or request.num_chunks is None:
        return
    batch, channels, chunk_size, height, width = request.latent_shape
    latent_frames = request.num_chunks * chunk_size
    frames = pixel_frames(latent_frames, temporal_scale=sizes.temporal_scale)
    values = frames * 3 * height * width * sizes.spatial_scale**2
    if output_type == "latent":
        values = latent_frames * channels * height * width
    value_bytes = {"pil": 1, "uint8": 2 * torch.uint8.itemsize}.get(output_type, 2 * torch.float32.itemsize)
    needed = batch * values * value_bytes
    if needed > available:
        raise MemoryShortage(
            f"{counted(batch, 'video')} of {counted(frames, 'frame')} (`output_type` {output_type!r}) "
            f"take {-(-needed // GIB)} GiB; {available // GIB} GiB are available. Make fewer frames, or take them "
            "chunk by chunk from `pipe.stream(...)`."
        )
