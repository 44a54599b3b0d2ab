"""What `longlive generate` is asked for, checked before anything large is loaded, and completed."""

import argparse
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..models.kv_cache import check_cache_dtype, check_window
from ..pipelines.inputs import resolve_size
from .arguments import default_device
from .pipeline_folder import PipelineFolder, check_lora_file
from .shots_file import RequestedShot, read_shots
from .video_reader import read_image, read_video
from .video_writer import check_output


FPS = 24  # of the model
DEFAULT_SECONDS = 5.0


@dataclass(frozen=True)
class Request:
    """What the user wants, checked as far as it can be without the models.

    `num_frames` None: endless. `condition_frames` are those of `video` that the result begins with.
    """

    shots: list[RequestedShot]
    image: Image.Image | None
    video: np.ndarray | None
    num_frames: int | None
    condition_frames: int
    seed: int
    device: torch.device

    def stream_arguments(self, args: argparse.Namespace) -> dict:
        """For `LongLivePipeline.stream`."""
        durations = [shot.chunks for shot in self.shots]
        return {
            "shot_prompts": [shot.prompt for shot in self.shots],
            "chunks_per_shot": None if None in durations else durations,
            "image": self.image,
            "video": self.video,
            "negative_prompt": args.negative_prompt,
            "num_frames": self.num_frames,
            "height": args.height,
            "width": args.width,
            "num_inference_steps": args.steps,
            "guidance_scale": args.guidance_scale,
            "window_size": args.window_size,
            "sink_size": args.sink_size,
            "relative_rope": True if args.relative_rope else None,
            "kv_cache_dtype": None if args.kv_cache == "auto" else args.kv_cache,
            "generator": torch.Generator().manual_seed(self.seed),
            "async_decode": args.stream,
        }


def check_request(args: argparse.Namespace) -> tuple[Request, PipelineFolder]:
    """Everything that can be wrong is found before the models are loaded, which may take minutes.

    Raises:
        ValueError: for arguments that contradict each other, files that are missing or malformed, an output that
            cannot be written, and sizes that the model cannot have.
    """
    check_output(args.output)
    if bool(args.prompts) == bool(args.shots_file):
        raise ValueError("give either prompts or a --shots-file" + (", not both" if args.prompts else ""))
    if args.image and args.video:
        raise ValueError("give either --image or --video, not both: a video begins with one of them")
    if args.negative_prompt is not None and args.guidance_scale == 1:
        raise ValueError("--negative-prompt does nothing with a --guidance-scale of 1")
    device = args.device or default_device()
    if args.offload != "none" and device.type == "cpu":
        raise ValueError("--offload keeps models away from a GPU until they are needed; this runs on the CPU")
    if args.offload != "none" and args.stream:
        raise ValueError("--stream runs two models at once, --offload keeps one on the GPU: choose one")
    shots = read_shots(args.shots_file) if args.shots_file else [RequestedShot(prompt) for prompt in args.prompts]
    image = read_image(args.image) if args.image else None
    video = at_frame_rate(*read_video(args.video)) if args.video else None
    if args.lora:
        check_lora_file(args.lora)

    folder = PipelineFolder.find(args.model)
    num_frames, condition_frames = choose_length(args, shots, 0 if video is None else len(video), folder)
    if num_frames is None and len(shots) > 1 and shots[0].chunks is None:
        raise ValueError(f"an endless video of {len(shots)} shots needs a --shots-file that says how long each lasts")
    config, settings = folder.transformer, folder.settings
    default = (config["sample_height"], config["sample_width"])
    resolve_size(args.height, args.width, {}, default, folder.vae["scale_factor_spatial"], config["patch_size"][1:])
    check_window(
        settings["window_size"] if args.window_size is None else args.window_size,
        settings["sink_size"] if args.sink_size is None else args.sink_size,
        config["chunk_size"],
        settings["multi_shot_sink"],
    )
    if args.kv_cache != "auto":
        check_cache_dtype(args.kv_cache, config["attention_head_dim"])
    seed = random.randrange(2**31) if args.seed is None else args.seed
    return Request(shots, image, video, num_frames, condition_frames, seed, device), folder


def choose_length(
    args: argparse.Namespace, shots: list[RequestedShot], video_frames: int, folder: PipelineFolder
) -> tuple[int | None, int]:
    """Frames of the whole video (None: endless), and how many of them are those of the video that is continued."""
    scale, chunk_size = folder.vae["scale_factor_temporal"], folder.transformer["chunk_size"]
    frames_of = lambda chunks: 1 + scale * (chunks * chunk_size - 1) if chunks else 0  # noqa: E731
    chunks_of = lambda frames: math.ceil((1 + (frames - 1) / scale) / chunk_size)  # noqa: E731
    condition_chunks = (1 + (video_frames - 1) // scale) // chunk_size if video_frames else 0
    if video_frames and not condition_chunks:
        raise ValueError(f"the video to continue has {video_frames} frames; at least {frames_of(1)} are needed")
    condition_frames = frames_of(condition_chunks)
    wanted = args.num_frames if args.seconds is None else max(1, round(args.seconds * FPS))
    if wanted is not None:
        if wanted <= condition_frames:
            raise ValueError(
                f"the length counts the whole video: {wanted} frames leave nothing to add to the {condition_frames} "
                "of the video that is continued"
            )
        return frames_of(chunks_of(wanted)), condition_frames
    if args.stream:
        return None, condition_frames
    if shots[0].chunks is not None:
        return frames_of(condition_chunks + sum(shot.chunks for shot in shots)), condition_frames
    return frames_of(condition_chunks + chunks_of(round(DEFAULT_SECONDS * FPS))), condition_frames


def at_frame_rate(frames: np.ndarray, fps: float) -> np.ndarray:
    """A video `[F, H, W, 3]` as it would be at the model's frame rate: nearest frames, none invented."""
    if abs(fps - FPS) < 0.1:  # 23.976 is meant to be 24
        return frames
    times = np.arange(max(1, round(len(frames) * FPS / fps))) / FPS
    return frames[np.minimum((times * fps).round().astype(int), len(frames) - 1)]
