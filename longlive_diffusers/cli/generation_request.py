"""The request to `longlive generate`, checked and completed before anything large is loaded."""

import argparse
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from ..frame_counts import chunks_to_cover, pixel_frames, whole_chunks
from ..models.tiny_decoder import TinyVideoDecoder
from ..pipelines.chunk_step import is_guided
from ..pipelines.inputs import ModelSizes, resolve_size
from ..user_path import user_path
from ..video.input_file import existing_file
from ..video.writer import check_output
from ..wording import counted
from .beginning import Beginning, read_beginning
from .choices import DEFAULT_SECONDS, FPS
from .decoders import choose_decoder
from .device import choose_device
from .embedded_lora import choose_embedded_lora
from .model_request import ModelRequest, check_model
from .shortcuts import kv_cache_dtype, shortcuts
from .shots_file import RequestedShot, read_shots


@dataclass(frozen=True)
class GenerationRequest:
    """What the user wants, checked as far as it can be without the models.

    `num_frames` is None for an endless video. `condition_frames` counts the frames that the result begins with, of the
    video that it continues. `embedded_lora` is the file of the LoRA that nobody named, if one is used. `decoder` makes
    the frames where it is not the VAE that does. `notes` are what the user should know before it begins, a line each.
    """

    shots: list[RequestedShot]
    beginning: Beginning
    num_frames: int | None
    condition_frames: int
    seed: int
    device: torch.device
    kv_cache_dtype: str | None
    embedded_lora: Path | None
    decoder: TinyVideoDecoder | None
    notes: list[str]

    def stream_arguments(self, args: argparse.Namespace) -> dict:
        """Return the arguments for `LongLivePipeline.stream`."""
        durations = [shot.chunks for shot in self.shots]
        return {
            "shot_prompts": [shot.prompt for shot in self.shots],
            "chunks_per_shot": None if None in durations else durations,
            "image": self.beginning.image,
            "video": self.beginning.video,
            "negative_prompt": args.negative_prompt,
            "num_frames": self.num_frames,
            "height": self.beginning.height,
            "width": self.beginning.width,
            "num_inference_steps": args.steps,
            "guidance_scale": args.guidance_scale,
            "window_size": args.window_size,
            "sink_size": args.sink_size,
            "relative_rope": True if args.relative_rope else None,
            "kv_cache_dtype": self.kv_cache_dtype,
            "split_first_chunk": args.split_first_chunk,
            "generator": torch.Generator().manual_seed(self.seed),
            "output_type": "uint8",
            "decoder": self.decoder,
            "async_decode": args.stream,
            **shortcuts(args, self.device),
        }


def check_request(args: argparse.Namespace) -> tuple[GenerationRequest, ModelRequest]:
    """Check the arguments, so that all errors are found before the models are loaded, which may take minutes.

    Raises:
        ValueError: For arguments that contradict each other, files that are missing or malformed, an output that
            cannot be written, and sizes that the model cannot have.
    """
    output = check_output(args.output)
    for option in ("shots_file", "image", "video"):
        given = vars(args)[option]
        if given is None or not output.exists():
            continue
        path = user_path(given)
        if os.path.exists(path) and path.samefile(output):
            name = option.replace("_", "-")
            raise ValueError(f"--output '{args.output}' is the file of --{name}, which would be lost")
    if bool(args.prompts) == bool(args.shots_file):
        raise ValueError("give either prompts or a --shots-file" + (", not both" if args.prompts else ""))
    if args.image and args.video:
        raise ValueError("give either --image or --video, not both: a video begins with one of them")
    if args.negative_prompt is not None and not is_guided(args.guidance_scale):
        raise ValueError(f"--negative-prompt does nothing with a --guidance-scale of {args.guidance_scale:g}")
    device = choose_device(args.device)
    if args.offload != "none" and device.type == "cpu":
        raise ValueError("--offload keeps models away from a GPU until they are needed; this runs on the CPU")
    if args.offload != "none" and args.stream:
        raise ValueError("--stream runs two models at once, --offload keeps one on the GPU: choose one")
    shots = read_shots(args.shots_file) if args.shots_file else [RequestedShot(prompt) for prompt in args.prompts]
    for kind, path in (("image", args.image), ("video", args.video)):
        if path:
            existing_file(path, kind)
    embedded_lora, lora_note = choose_embedded_lora(args)
    models = check_model(args)
    if models.num_devices > 1 and args.offload != "none":
        raise ValueError("--offload is for one GPU; several --devices have room for the models")
    sizes = models.folder.sizes
    decoder = choose_decoder(args, sizes)
    resolve_size(args.height, args.width, {}, sizes.sample_size, sizes.spatial_scale, sizes.patch_size)
    beginning = read_beginning(args, sizes, requested_frames(args))
    num_frames, condition_frames = choose_length(args, shots, len(beginning.video or ()), sizes)
    if num_frames is None and len(shots) > 1 and shots[0].chunks is None:
        raise ValueError(f"an endless video of {len(shots)} shots needs a --shots-file that says how long each lasts")
    seed = random.randrange(2**31) if args.seed is None else args.seed
    notes = [*beginning.notes, *([] if lora_note is None else [lora_note])]
    notes += models.notes
    if output.is_fifo():
        notes.append(f"'{output}' is a pipe: nothing can be written before somebody reads it")
    request = GenerationRequest(
        shots,
        beginning,
        num_frames,
        condition_frames,
        seed,
        device,
        kv_cache_dtype(args, device, sizes.head_dim),
        embedded_lora,
        decoder,
        notes,
    )
    return request, models


def requested_frames(args: argparse.Namespace) -> int | None:
    """Return the length that the user asked for in frames or seconds; None for neither."""
    return args.num_frames if args.seconds is None else max(1, round(args.seconds * FPS))


def choose_length(
    args: argparse.Namespace, shots: list[RequestedShot], video_frames: int, sizes: ModelSizes
) -> tuple[int | None, int]:
    """Return the frames of the whole video (None: endless), and how many of them come from the video it continues."""
    scale, chunk_size = sizes.temporal_scale, sizes.chunk_size
    condition_chunks = whole_chunks(video_frames, chunk_size, temporal_scale=scale) if video_frames else 0
    if video_frames and not condition_chunks:
        needed = pixel_frames(chunk_size, temporal_scale=scale)
        raise ValueError(f"the video to continue has {counted(video_frames, 'frame')}; at least {needed} are needed")
    condition_frames = pixel_frames(condition_chunks * chunk_size, temporal_scale=scale)
    num_frames = requested_frames(args)
    if num_frames is not None:
        if num_frames <= condition_frames:
            raise ValueError(
                f"the length counts the whole video: {counted(num_frames, 'frame')} would leave nothing to add to the "
                f"{condition_frames} or more of the video that is continued"
            )
        num_chunks = chunks_to_cover(num_frames, chunk_size, temporal_scale=scale)
    elif args.stream:
        return None, condition_frames
    elif shots[0].chunks is not None:
        num_chunks = condition_chunks + sum(shot.chunks or 0 for shot in shots)
    else:
        num_chunks = condition_chunks + chunks_to_cover(round(DEFAULT_SECONDS * FPS), chunk_size, temporal_scale=scale)
    return pixel_frames(num_chunks * chunk_size, temporal_scale=scale), condition_frames
