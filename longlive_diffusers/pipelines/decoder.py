"""ChunkDecoder: from clean latents to frames, chunk by chunk; the twin of `ChunkDenoiser`."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from ..models.streaming_vae import StreamingDecoder, denormalize_latents
from .pipeline_output import Frames


class ChunkDecoder:
    """
    Decodes the chunks of one video, in order. It holds the features that the VAE hands on from chunk to chunk, and
    knows nothing of who makes the latents.

    Args:
        vae: Decodes; not changed.
        video_processor: Brings pixels into the output layout.
        output_type: "np", "pt" or "pil".
        device: Where the VAE works, perhaps another one than where the latents come from.
        own_stream: Whether to decode on a CUDA stream of its own, beside what makes the next latents.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        video_processor: VideoProcessor,
        output_type: str,
        device: torch.device,
        *,
        own_stream: bool = False,
    ):
        self.vae, self.video_processor, self.output_type, self.device = vae, video_processor, output_type, device
        self._decoder = StreamingDecoder(vae)
        self._stream = torch.cuda.Stream(device) if own_stream else None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, ready: torch.cuda.Event | None = None) -> Frames:
        """
        Args:
            latents: The next chunk, normalized, `[B, C, F, h, w]`.
            ready: Marks when the latents are there, for a stream of its own to wait for.

        Returns:
            The chunk's frames in the output layout; whoever works on the current stream may use them.
        """
        if self._stream is None:
            return self._frames(latents)
        if ready is not None:
            self._stream.wait_event(ready)
        latents.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            frames = self._frames(latents)
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_stream(self._stream)
        if isinstance(frames, torch.Tensor):
            frames.record_stream(consumer)
        return frames

    def _frames(self, latents: torch.Tensor) -> Frames:
        latents = denormalize_latents(self.vae, latents).to(self.device, self.vae.dtype)
        return self.video_processor.postprocess_video(self._decoder.decode(latents), output_type=self.output_type)
