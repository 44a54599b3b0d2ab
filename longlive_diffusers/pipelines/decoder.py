"""ChunkDecoder: decodes clean latents to frames, chunk by chunk; the counterpart of `ChunkDenoiser`."""

from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from ..models.streaming_tiny_decoder import StreamingTinyDecoder
from ..models.streaming_vae import StreamingDecoder, latent_statistics
from ..models.tiny_decoder import TinyVideoDecoder
from .bytes_on_host import HostCopier, to_bytes
from .pipeline_output import Frames, check_numbers, check_sound
from .stopwatch import Stopwatch


class ChunkDecoder:
    """
    Decodes the chunks of one video, in order. It holds the features that the network passes from chunk to chunk, and
    does not depend on who makes the latents.

    Args:
        network: The VAE or the tiny decoder that decodes; not changed.
        video_processor: Converts pixels to the output layout.
        output_type: The layout of the frames: "np", "pt", "pil" or "uint8".
        device: The device that the network runs on, possibly another one than that of the latents.
        stream: The CUDA stream to decode on, in parallel with what the caller's stream does; None for the caller's.
        group: Ranks that decode together, as in [`StreamingDecoder`]: all give the same latents and get all frames.
            (With a tiny decoder, each rank decodes for itself.)

    `stopwatch` has the time that the last chunk took.
    """

    def __init__(
        self,
        network: AutoencoderKLWan | TinyVideoDecoder,
        video_processor: VideoProcessor,
        output_type: str,
        device: torch.device,
        *,
        stream: torch.cuda.Stream | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.network, self.video_processor, self.output_type = network, video_processor, output_type
        self.device, self._stream, self._copier = device, stream, HostCopier()
        self._decoder: StreamingTinyDecoder | StreamingDecoder
        if isinstance(network, TinyVideoDecoder):
            self._decoder, self._statistics = StreamingTinyDecoder(network), None  # it takes normalized latents
        else:
            # Made once: on a GPU, making a tensor of Python's numbers waits for the device.
            self._decoder, self._statistics = StreamingDecoder(network, group), latent_statistics(network, device)
        self.stopwatch: Stopwatch | None = None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, ready: torch.cuda.Event | None = None) -> Frames:
        """
        Decode the next chunk.

        Args:
            latents: The normalized latents of the next chunk, `[B, C, F, h, w]`, float32.
            ready: Marks when the latents are ready, where that is before the work of the current stream is done. A
                decoder without a stream of its own does not look at it: the caller's stream has to wait.

        Returns:
            The chunk's frames in the output layout, ready to be used on the current stream.

        Raises:
            ValueError: If frames on the host have values that are not numbers.
        """
        if self._stream is None:
            return self._timed_frames(latents)
        caller = torch.cuda.current_stream(self.device)
        if ready is None:
            self._stream.wait_stream(caller)
        else:
            self._stream.wait_event(ready)
        latents.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            frames = self._timed_frames(latents)
        caller.wait_stream(self._stream)
        if isinstance(frames, torch.Tensor):
            frames.record_stream(caller)
        return frames

    def _timed_frames(self, latents: torch.Tensor) -> Frames:
        latents = latents.to(self.device, torch.float32)  # before the clock starts: it may have to wait for them
        self.stopwatch = Stopwatch(self.device)
        frames = self._frames(latents)
        self.stopwatch.stop()
        return frames

    def _frames(self, latents: torch.Tensor) -> Frames:
        if self._statistics is not None:
            mean, std = self._statistics
            latents = latents * std + mean
        # In float32: half of bfloat16's numbers in [0, 1] are further apart than half a level of 8 bits.
        pixels = self._decoder.decode(latents.to(self.network.dtype)).float()
        # PIL images are made of arrays, as diffusers does: a pixel that is not a number would be some color in them.
        layout = "pt" if self.output_type in ("pt", "uint8") else "np"
        frames: Any = self.video_processor.postprocess_video(pixels, output_type=layout)
        if self.output_type == "uint8":
            frames, sound = self._copier.copy(to_bytes(frames), torch.isfinite(frames).all())
            check_sound(sound)
            return frames
        check_numbers(frames)
        if self.output_type == "pil":
            return [self.video_processor.numpy_to_pil(video) for video in frames]
        return frames
