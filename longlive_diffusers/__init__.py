"""LongLive-2.0 in diffusers: real-time, minute-long, multi-shot, interactive video.

Importing this package registers its classes, so that `DiffusionPipeline.from_pretrained` and `AutoModel` find them.
What it exposes is imported when it is first used: torch and diffusers take seconds, which `longlive --help` would wait
for as well.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register
from .version import __version__


if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from .conversion.convert import convert_checkpoint
    from .frame_counts import chunks_to_cover, latent_frames, pixel_frames, whole_chunks
    from .models.kv_cache import KVCache
    from .models.layer_kv_cache import LayerKVCache
    from .models.streaming_tiny_decoder import StreamingTinyDecoder
    from .models.streaming_vae import StreamingDecoder, StreamingEncoder
    from .models.tiny_decoder import TinyVideoDecoder
    from .models.transformer_longlive import LongLiveTransformer3DModel
    from .nvfp4.quantizer import NVFP4Config
    from .parallel.stream_config import StreamParallelConfig
    from .pipelines.pipeline_longlive import LongLivePipeline
    from .pipelines.pipeline_output import LongLivePipelineOutput, VideoChunk
    from .pipelines.session import StreamingSession
    from .pipelines.shots import Shot, ShotPlan
    from .schedulers.scheduling_longlive import LongLiveScheduler
    from .video.writer import VideoWriter

__all__ = [
    "KVCache",
    "LayerKVCache",
    "LongLivePipeline",
    "LongLivePipelineOutput",
    "LongLiveScheduler",
    "LongLiveTransformer3DModel",
    "ModelMixin",
    "NVFP4Config",
    "SchedulerMixin",
    "Shot",
    "ShotPlan",
    "StreamParallelConfig",
    "StreamingDecoder",
    "StreamingEncoder",
    "StreamingSession",
    "StreamingTinyDecoder",
    "TinyVideoDecoder",
    "VideoChunk",
    "VideoWriter",
    "__version__",
    "chunks_to_cover",
    "convert_checkpoint",
    "latent_frames",
    "pixel_frames",
    "whole_chunks",
]

_MODULES = {
    "KVCache": ".models.kv_cache",
    "LayerKVCache": ".models.layer_kv_cache",
    "LongLivePipeline": ".pipelines.pipeline_longlive",
    "LongLivePipelineOutput": ".pipelines.pipeline_output",
    "LongLiveScheduler": ".schedulers.scheduling_longlive",
    "LongLiveTransformer3DModel": ".models.transformer_longlive",
    "ModelMixin": "diffusers",  # looked up here by diffusers when it loads our components
    "NVFP4Config": ".nvfp4.quantizer",
    "SchedulerMixin": "diffusers",  # the same
    "Shot": ".pipelines.shots",
    "ShotPlan": ".pipelines.shots",
    "StreamParallelConfig": ".parallel.stream_config",
    "StreamingDecoder": ".models.streaming_vae",
    "StreamingEncoder": ".models.streaming_vae",
    "StreamingSession": ".pipelines.session",
    "StreamingTinyDecoder": ".models.streaming_tiny_decoder",
    "TinyVideoDecoder": ".models.tiny_decoder",
    "VideoChunk": ".pipelines.pipeline_output",
    "VideoWriter": ".video.writer",
    "chunks_to_cover": ".frame_counts",
    "convert_checkpoint": ".conversion.convert",
    "latent_frames": ".frame_counts",
    "pixel_frames": ".frame_counts",
    "whole_chunks": ".frame_counts",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
