"""The networks that `longlive bench` measures, built as its options ask, and the video that they make."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.tiny_decoder import TinyVideoDecoder
from ..nvfp4.quantizer import NVFP4Config, quantize_model
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..pipelines.session import StreamingSession
from .models import random_model, random_pipeline
from .options import BenchOptions
from .sizes import BenchSize


@dataclass(frozen=True)
class Setup:
    """
    Networks, and the video that they make.

    Args:
        pipe: The pipeline, on `device`.
        size: The sizes of the video.
        embeds: The embeddings of its prompt, `[1, text_tokens, text_dim]`.
        device: The device that is waited for.
        decoder: A tiny decoder in place of the VAE, or None.
        stream_options: Further arguments of `LongLivePipeline.stream`, by name.
    """

    pipe: LongLivePipeline
    size: BenchSize
    embeds: torch.Tensor
    device: torch.device
    decoder: TinyVideoDecoder | None = None
    stream_options: Mapping[str, Any] = field(default_factory=dict)

    def stream(self, num_chunks: int, **options: Any) -> StreamingSession:
        """Begin a video of `num_chunks` chunks; `options` are further arguments of `LongLivePipeline.stream`."""
        scale = self.pipe.vae_scale_factor_spatial
        return self.pipe.stream(
            prompt_embeds=self.embeds,
            height=self.size.height * scale,
            width=self.size.width * scale,
            num_frames=self.size.num_frames(num_chunks),
            num_inference_steps=self.size.num_inference_steps,
            generator=torch.Generator().manual_seed(0),
            **self.stream_options,
            **options,
        )


def build(options: BenchOptions) -> Setup:
    """Build the networks, with random weights, and the embeddings of a prompt."""
    size, device = options.size, options.device
    pipe = random_pipeline(size, device, options.dtype)
    if options.nvfp4_backend:
        quantize_model(pipe.transformer, NVFP4Config(backend=options.nvfp4_backend))
    if options.attention_backend:
        pipe.transformer.set_attention_backend(options.attention_backend)
    if options.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    pipe.optimize(options.speed)
    decoder = None
    if options.decoder == "tiny":
        dtype = torch.float16 if device.type == "cuda" else torch.float32  # as in `longlive generate`
        decoder = random_model(TinyVideoDecoder, size.tiny_decoder, device, dtype)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, size.text_tokens, size.transformer["text_dim"], generator=generator)
    return Setup(pipe, size, embeds.to(device, options.dtype), device, decoder, options.stream)
