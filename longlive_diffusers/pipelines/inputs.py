"""What the caller asks for, checked and brought to one form before any long work begins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import PIL.Image
import torch
from diffusers.utils import logging
from diffusers.video_processor import VideoProcessor

from ..models.kv_cache import check_cache_dtype
from .shots import ShotPlan, is_count


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("np", "pt", "pil", "latent")


@dataclass(frozen=True)
class VideoSize:
    """Of one video: pixels, latents, and how one becomes the other."""

    height: int
    width: int
    latent_height: int
    latent_width: int


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch: the shot prompts of each video, and whether the caller passed a single video."""

    videos: list[list[str]]
    durations: list[int | Sequence[int] | None]
    is_single: bool

    def plans(self, num_chunks: int | None, num_videos_per_prompt: int) -> list[ShotPlan]:
        """A plan for each row of the batch, the videos of one prompt next to each other."""
        plans = [
            ShotPlan.from_prompts(shots, durations, num_chunks)
            for shots, durations in zip(self.videos, self.durations, strict=True)
        ]
        return [plan for plan in plans for _ in range(num_videos_per_prompt)]


def resolve_prompts(
    prompt, shot_prompts, chunks_per_shot, prompt_embeds, negative_prompt, negative_prompt_embeds, text_dim: int
) -> Prompts | None:
    """One list of shot prompts for each video; None where `prompt_embeds` are given.

    Raises:
        ValueError: For none or several of `prompt`, `shot_prompts` and `prompt_embeds`; for other types than strings
            and lists of strings; for durations without shots; for negative prompts that do not match; for embeddings
            that are not of `text_dim` channels.
    """
    given = {"prompt": prompt, "shot_prompts": shot_prompts, "prompt_embeds": prompt_embeds}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"Pass exactly one of `prompt`, `shot_prompts` and `prompt_embeds`, got {names or 'none'}.")
    if chunks_per_shot is not None and shot_prompts is None:
        raise ValueError("`chunks_per_shot` needs `shot_prompts`: a `prompt` lasts for the whole video.")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("Pass either `negative_prompt` or `negative_prompt_embeds`, not both.")

    if prompt_embeds is not None:
        check_embeds("prompt_embeds", prompt_embeds, text_dim)
        batch = prompt_embeds.shape[0]
        prompts = None
    elif prompt is not None:
        is_single = isinstance(prompt, str)
        videos = [[text] for text in ([prompt] if is_single else _strings("prompt", prompt))]
        prompts, batch = Prompts(videos, [None] * len(videos), is_single), len(videos)
    else:
        prompts = _resolve_shots(shot_prompts, chunks_per_shot)
        batch = len(prompts.videos)

    if isinstance(negative_prompt, list) and len(_strings("negative_prompt", negative_prompt)) != batch:
        raise ValueError(f"`negative_prompt` has {len(negative_prompt)} prompts for a batch of {batch}.")
    if negative_prompt is not None and not isinstance(negative_prompt, str | list):
        raise ValueError(f"`negative_prompt` must be a string or a list, got {type(negative_prompt).__name__}.")
    if negative_prompt_embeds is not None:
        check_embeds("negative_prompt_embeds", negative_prompt_embeds, text_dim)
        if negative_prompt_embeds.shape[0] != batch:
            raise ValueError(
                f"`negative_prompt_embeds` {tuple(negative_prompt_embeds.shape)} has another batch size than {batch}."
            )
    return prompts


def _resolve_shots(shot_prompts, chunks_per_shot) -> Prompts:
    if not isinstance(shot_prompts, list) or not shot_prompts:
        raise ValueError(f"`shot_prompts` must be a list of prompts, or a list of such lists, got {shot_prompts!r}.")
    is_single = not isinstance(shot_prompts[0], list)
    videos = [_strings("shot_prompts", shots) for shots in ([shot_prompts] if is_single else shot_prompts)]
    nested = isinstance(chunks_per_shot, list) and any(isinstance(item, list) for item in chunks_per_shot)
    if not nested:
        return Prompts(videos, [chunks_per_shot] * len(videos), is_single)
    if is_single or len(chunks_per_shot) != len(videos):
        raise ValueError(f"`chunks_per_shot` has {len(chunks_per_shot)} lists for a batch of {len(videos)}.")
    return Prompts(videos, chunks_per_shot, is_single)


def _strings(name: str, value) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` must be a string or a list of at least one string, got {value!r}.")
    for item in value:
        if not isinstance(item, str):
            raise ValueError(f"`{name}` must hold strings, got {type(item).__name__} {item!r}.")
    return value


def check_embeds(name: str, embeds: torch.Tensor, text_dim: int) -> None:
    is_tensor = isinstance(embeds, torch.Tensor)
    if not is_tensor or embeds.ndim != 3 or 0 in embeds.shape or embeds.shape[-1] != text_dim:
        shape = tuple(embeds.shape) if is_tensor else type(embeds).__name__
        raise ValueError(f"`{name}` must be [B, L, {text_dim}], got {shape}.")
    check_finite(name, embeds)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"`{name}` has {int((~torch.isfinite(tensor)).sum())} values that are not finite.")


def check_latents(name: str, latents: torch.Tensor | None, channels: int, chunk_size: int | None) -> None:
    """`chunk_size` None: a single frame; otherwise a positive multiple of it."""
    if latents is None:
        return
    if not isinstance(latents, torch.Tensor) or latents.ndim != 5 or latents.shape[1] != channels:
        shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"`{name}` must be [B, {channels}, F, h, w], got {shape}.")
    frames = latents.shape[2]
    if chunk_size is None and frames != 1:
        raise ValueError(f"`{name}` must have 1 latent frame, got {frames}.")
    if chunk_size is not None and (frames < 1 or frames % chunk_size):
        raise ValueError(f"`{name}` must have a multiple of {chunk_size} latent frames (whole chunks), got {frames}.")
    check_finite(name, latents)


def resolve_size(
    height: int | None,
    width: int | None,
    given: dict[str, torch.Tensor | None],
    default: tuple[int, int],
    scale: int,
    patch: tuple[int, int],
) -> VideoSize:
    """The size of the video, from what is asked for, from latents that are `given`, or the model's default.

    Args:
        height, width: In pixels, or None.
        given: Latents by name.
        default: Latent height and width.
        scale: Pixels of a latent's side.
        patch: Latents of a token's sides.
    """
    sizes = {name: tuple(latents.shape[-2:]) for name, latents in given.items() if latents is not None}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Latents of different sizes: {sizes}.")
    latent_height, latent_width = next(iter(sizes.values()), default)
    multiple = (scale * patch[0], scale * patch[1])
    for name, value, step in (("height", height, multiple[0]), ("width", width, multiple[1])):
        if value is not None and (not is_count(value) or value < step or value % step):
            raise ValueError(f"`{name}` must be a positive multiple of {step}, got {value!r}.")
    if latent_height % patch[0] or latent_width % patch[1]:
        raise ValueError(f"Latents of {latent_height}x{latent_width} do not split into {patch[0]}x{patch[1]} patches.")
    size = (height or latent_height * scale, width or latent_width * scale)
    if sizes and size != (latent_height * scale, latent_width * scale):
        raise ValueError(
            f"{next(iter(sizes))} of {latent_height}x{latent_width} are a video of {latent_height * scale}x"
            f"{latent_width * scale}, not of {size[0]}x{size[1]}."
        )
    return VideoSize(*size, size[0] // scale, size[1] // scale)


def resolve_num_chunks(
    num_frames: int | None, latents: torch.Tensor | None, condition_frames: int, chunk_size: int, temporal_scale: int
) -> int | None:
    """Chunks of the whole result, conditioning video included; None for an endless stream.

    Args:
        num_frames: Pixel frames asked for; rounded up to whole chunks, with a warning. None: endless.
        latents: Initial noise of the new frames; decides, where given.
        condition_frames: Latent frames of the video that is continued.
    """
    if latents is not None:
        return (latents.shape[2] + condition_frames) // chunk_size
    if num_frames is None:
        return None
    if not is_count(num_frames) or num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames!r}.")
    latent_frames = 1 + math.ceil((num_frames - 1) / temporal_scale)
    num_chunks = math.ceil(latent_frames / chunk_size)
    rounded = 1 + temporal_scale * (num_chunks * chunk_size - 1)
    if num_chunks * chunk_size <= condition_frames:
        raise ValueError(
            f"`num_frames` counts the whole result: {num_frames} frames leave nothing to add to a video of "
            f"{1 + temporal_scale * (condition_frames - 1)} frames."
        )
    if rounded != num_frames:
        logger.warning(
            f"`num_frames` {num_frames} is not a whole number of chunks of {chunk_size} latent frames; "
            f"using {rounded} frames ({num_chunks} chunks)."
        )
    return num_chunks


def check_options(
    *,
    num_inference_steps,
    guidance_scale,
    num_videos_per_prompt,
    multi_shot_rope_offset,
    output_type,
    attention_kwargs,
    max_sequence_length,
    kv_cache_dtype,
    head_dim,
    callback_inputs,
    allowed_callback_inputs,
) -> None:
    """Raise a ValueError that states the value, for options outside their range."""
    counts = {
        "num_inference_steps": num_inference_steps,
        "num_videos_per_prompt": num_videos_per_prompt,
        "max_sequence_length": max_sequence_length,
    }
    for name, value in counts.items():
        if not is_count(value) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    for name, value in {"guidance_scale": guidance_scale, "multi_shot_rope_offset": multi_shot_rope_offset}.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
            raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}.")
    check_output_type(output_type)
    if kv_cache_dtype is not None:
        check_cache_dtype(kv_cache_dtype, head_dim)
    if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
        raise ValueError(f"`attention_kwargs` must be a dict, got {type(attention_kwargs).__name__}.")
    unknown = [name for name in callback_inputs or [] if name not in allowed_callback_inputs]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be in {allowed_callback_inputs}, got {unknown}.")


def check_generator(generator: torch.Generator | list[torch.Generator] | None, rows: int) -> None:
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for item in generators:
        if not isinstance(item, torch.Generator):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {type(item).__name__}.")
    if isinstance(generator, list) and len(generator) != rows:
        raise ValueError(f"`generator` has {len(generator)} generators for a batch of {rows} videos.")


def for_each_video(name: str, tensor: torch.Tensor, batch: int, num_videos_per_prompt: int) -> torch.Tensor:
    """`[1, B or rows, ...]` -> `[rows, ...]`: one value may serve all prompts, or a prompt's one all of its videos."""
    rows = batch * num_videos_per_prompt
    if tensor.shape[0] == rows:
        return tensor
    if tensor.shape[0] == batch:
        return tensor.repeat_interleave(num_videos_per_prompt, dim=0)
    if tensor.shape[0] == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    raise ValueError(
        f"`{name}` has batch size {tensor.shape[0]}; {batch} prompts of {num_videos_per_prompt} videos need "
        f"1, {batch} or {rows}."
    )


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")


def check_conditions(image, video, image_latents, video_latents) -> None:
    """At most one of the four: a video either begins with an image or continues another one."""
    given = {"image": image, "video": video, "image_latents": image_latents, "video_latents": video_latents}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"Pass at most one of `image`, `video`, `image_latents` and `video_latents`, got {names}.")


def image_to_pixels(image, processor: VideoProcessor, size: VideoSize) -> torch.Tensor:
    """A PIL image, array `[H, W, 3]` or tensor `[3, H, W]`, or a batch of them -> `[B, 3, 1, height, width]` in
    [-1, 1]; resized."""
    images = image if isinstance(image, list) else [image]
    if not images:
        raise ValueError("`image` is an empty list.")
    pixels = [processor.preprocess(_as_pixels("image", item, (3, 4)), size.height, size.width) for item in images]
    return torch.cat(pixels).unsqueeze(2)


def video_to_pixels(
    video, processor: VideoProcessor, size: VideoSize, chunk_size: int, temporal_scale: int
) -> torch.Tensor:
    """A list of PIL images, array `[F, H, W, 3]` or tensor `[F, 3, H, W]`, or a batch of them ->
    `[B, 3, F, height, width]` in [-1, 1]; resized, and cut to whole chunks."""
    if isinstance(video, list) and video and isinstance(video[0], PIL.Image.Image):
        video = [video]
    videos = video if isinstance(video, list) else list(video) if _ndim(video) == 5 else [video]
    if not videos:
        raise ValueError("`video` is an empty list.")
    pixels = []
    for item in videos:
        frames = item if isinstance(item, list) else [item]
        parts = [processor.preprocess(_as_pixels("video", part, (3, 4)), size.height, size.width) for part in frames]
        pixels.append(torch.cat(parts).transpose(0, 1))
    lengths = {item.shape[1] for item in pixels}
    if len(lengths) > 1:
        raise ValueError(f"The videos of a batch must have the same number of frames, got {sorted(lengths)}.")
    total = lengths.pop()
    num_chunks = (1 + (total - 1) // temporal_scale) // chunk_size
    kept = 1 + temporal_scale * (num_chunks * chunk_size - 1)
    if num_chunks == 0:
        needed = 1 + temporal_scale * (chunk_size - 1)
        raise ValueError(f"`video` has {total} frames; a chunk of {chunk_size} latent frames needs {needed}.")
    if kept != total:
        logger.warning(f"`video` has {total} frames; continuing its last {kept} ({num_chunks} whole chunks).")
    return torch.stack([item[:, total - kept :] for item in pixels])


def condition_frames(video: torch.Tensor | None, video_latents: torch.Tensor | None, temporal_scale: int) -> int:
    """Latent frames of the video that is continued; 0 without one."""
    if video is not None:
        return 1 + (video.shape[2] - 1) // temporal_scale
    return 0 if video_latents is None else video_latents.shape[2]


def _ndim(value) -> int | None:
    return value.ndim if isinstance(value, np.ndarray | torch.Tensor) else None


def _as_pixels(name: str, value, allowed_ndim: tuple[int, ...]):
    """What `VideoProcessor.preprocess` understands; integers become fractions of 255."""
    if isinstance(value, PIL.Image.Image):
        return value.convert("RGB")
    if not isinstance(value, np.ndarray | torch.Tensor):
        raise ValueError(f"`{name}` must hold PIL images, arrays or tensors, got {type(value).__name__}.")
    channels = value.shape[-1] if isinstance(value, np.ndarray) else value.shape[-3] if value.ndim >= 3 else 0
    if value.ndim not in allowed_ndim or channels != 3 or 0 in value.shape:
        expected = "[(F,) H, W, 3]" if isinstance(value, np.ndarray) else "[(F,) 3, H, W]"
        raise ValueError(f"`{name}` must be {expected}, got shape {tuple(value.shape)}.")
    if isinstance(value, np.ndarray):
        value = value.astype(np.float32) / 255 if value.dtype == np.uint8 else value.astype(np.float32)
        finite = bool(np.isfinite(value).all())
        value = value[None] if value.ndim == 3 else value
    else:
        value = value.float() / 255 if value.dtype == torch.uint8 else value.float()
        finite = bool(torch.isfinite(value).all())
        value = value[None] if value.ndim == 3 else value
    if not finite:
        raise ValueError(f"`{name}` has values that are not finite.")
    return value
