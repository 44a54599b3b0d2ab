"""LongLive-2.0 in diffusers: real-time, minute-long, multi-shot, interactive video.

Importing this package registers its classes, so that `DiffusionPipeline.from_pretrained` and `AutoModel` find them.
"""

from diffusers import ModelMixin, SchedulerMixin  # looked up here by diffusers when it loads our components

from .conversion.convert import convert_checkpoint
from .frame_counts import chunks_to_cover, latent_frames, pixel_frames, whole_chunks
from .models.kv_cache import KVCache
from .models.layer_kv_cache import LayerKVCache
from .models.streaming_vae import StreamingDecoder, StreamingEncoder
from .models.transformer_longlive import LongLiveTransformer3DModel
from .nvfp4.quantizer import NVFP4Config, register_quantizer
from .pipelines.pipeline_longlive import LongLivePipeline
from .pipelines.pipeline_output import LongLivePipelineOutput, VideoChunk
from .pipelines.session import StreamingSession
from .pipelines.shots import Shot, ShotPlan
from .registration import register
from .schedulers.scheduling_longlive import LongLiveScheduler
from .version import __version__
from .video.writer import VideoWriter


register({cls.__name__: cls for cls in (LongLivePipeline, LongLiveTransformer3DModel, LongLiveScheduler)})
register_quantizer()

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
    "StreamingDecoder",
    "StreamingEncoder",
    "StreamingSession",
    "VideoChunk",
    "VideoWriter",
    "__version__",
    "chunks_to_cover",
    "convert_checkpoint",
    "latent_frames",
    "pixel_frames",
    "whole_chunks",
]
