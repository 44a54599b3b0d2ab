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
    batch, _, chunk_size, height, width = request.latent_shape
    config = transformer.config
    frames = request.window_size
    if request.num_chunks is not None:
        frames = min(frames, request.num_chunks * chunk_size)
    tokens = frames * (height // config.patch_size[1]) * (width // config.patch_size[2])
    inner_dim = config.num_attention_heads * config.attention_head_dim
    text_bytes = text_length * (2 * config.num_layers * inner_dim + config.text_dim) * transformer.dtype.itemsize
    has_split_branches = transformer.stream_ranks is not None and transformer.stream_ranks.branch is not None
    num_caches = 2 if is_guided(request.guidance_scale) and not has_split_branches else 1
    needed = batch * num_caches * (tokens * bytes_per_token(transformer, request) + text_bytes)
    if needed > available:
        raise MemoryShortage(
            f"The KV cache of {batch} x {frames} latent frames of {height}x{width}, with prompts of {text_length} "
            f"tokens, needs {-(-needed // GIB)} GiB; {available // GIB} GiB are available. {ADVICE}"
        )


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
