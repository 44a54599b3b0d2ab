"""ChunkDecoder: decodes clean latents to frames, chunk by chunk; the counterpart of `ChunkDenoiser`."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from ..models.streaming_vae import StreamingDecoder, denormalize_latents
from .pipeline_output import Frames


class ChunkDecoder:
    """
    Decodes the chunks of one video, in order. It holds the features that the VAE passes from chunk to chunk, and does
    not depend on who makes the latents.

    Args:
        vae: The VAE that decodes; not changed.
        video_processor: Converts pixels to the output layout.
        output_type: The layout of the frames: "np", "pt" or "pil".
        device: The device that the VAE runs on, possibly another one than that of the latents.
        own_stream: Whether to decode on a separate CUDA stream, in parallel with the denoising of the next latents.
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
        Decode the next chunk.

        Args:
            latents: The normalized latents of the next chunk, `[B, C, F, h, w]`.
            ready: Marks when the latents are ready, for a separate stream to wait for.

        Returns:
            The chunk's frames in the output layout, ready to be used on the current stream.
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
