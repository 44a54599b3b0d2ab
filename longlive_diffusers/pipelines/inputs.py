"""Check what the caller asks for and bring it into one form, a [`Request`], before any long work begins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging

from ..frame_counts import chunks_to_cover, latent_frames, pixel_frames
from ..limits import MAX_GUIDANCE_SCALE, MAX_SIDE
from ..models.attention_kwargs import check_attention_kwargs
from ..models.kv_cache import check_window
from ..models.layer_kv_cache import resolve_kv_cache_dtype
from ..models.sparse_attention import check_density
from ..models.tiny_decoder import TinyVideoDecoder
from ..number_checks import check_booleans, check_counts, check_non_negative, is_count
from ..tensor_checks import check_finite, check_floats
from ..wording import alternatives, counted
from .callbacks import resolve_callback_inputs
from .chunk_step import check_clean_pass
from .conditions import check_conditions, image_to_pixels, video_to_pixels
from .prompt_cleaning import shortened
from .shots import ShotPlan


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("np", "uint8", "pt", "pil", "latent")
MAX_FRAMES = 2**53  # up to there, time positions are exact
MAX_ROPE_OFFSET = 1e9  # angles of float64 are exact to a millionth there


@dataclass(frozen=True)
class ModelSizes:
    """
    The sizes of a pipeline's networks that a request has to fit; configurations on disk are enough to know them.

    Args:
        latent_channels: The number of channels of the latents.
        text_dim: The number of channels of the prompt embeddings.
        head_dim: The number of channels of an attention head.
        chunk_size: The number of latent frames in a chunk.
        patch_size: The height and width of a token, in latents.
        sample_size: The default height and width of a video, in latents.
        spatial_scale, temporal_scale: How many pixels a latent spans along each side, and how many pixel frames a
            latent frame stands for.
    """

    latent_channels: int
    text_dim: int
    head_dim: int
    chunk_size: int
    patch_size: tuple[int, int]
    sample_size: tuple[int, int]
    spatial_scale: int
    temporal_scale: int

    @classmethod
    def of_configs(cls, transformer: Mapping[str, Any], spatial_scale: int, temporal_scale: int) -> "ModelSizes":
        """Return the sizes in a transformer's configuration, with the scales of a VAE."""
        _, patch_height, patch_width = transformer["patch_size"]
        return cls(
            latent_channels=transformer["in_channels"],
            text_dim=transformer["text_dim"],
            head_dim=transformer["attention_head_dim"],
            chunk_size=transformer["chunk_size"],
            patch_size=(patch_height, patch_width),
            sample_size=(transformer["sample_height"], transformer["sample_width"]),
            spatial_scale=spatial_scale,
            temporal_scale=temporal_scale,
        )


@dataclass(frozen=True)
class VideoSize:
    """The size of one video in pixels and in latents."""

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

    def plans(self, num_chunks: int | None) -> list[ShotPlan]:
        """Return a plan for each video of `num_chunks` (None: endless); prompts that find no room in it are named in a
        warning."""
        plans = []
        for shots, durations in zip(self.videos, self.durations, strict=True):
            plan = ShotPlan.from_prompts(shots, durations, num_chunks)
            plans.append(plan)
            left_out = shots[plan.num_reached(num_chunks) :]
            if left_out and num_chunks is not None:
                logger.warning(
                    f"There is no room for {len(left_out)} of {counted(len(shots), 'prompt')} in a video of "
                    f"{counted(num_chunks, 'chunk')}: {', '.join(map(shortened, left_out))}."
                )
        return plans


@dataclass(frozen=True)
class Request:
    """
    A checked request: everything that a session is made from, except for the networks.

    Sizes are counted in latent frames. Tensors hold the samples of the batch, `[B, ...]`, where
    `B = num_prompts * num_videos_per_prompt`.

    Args:
        latent_shape: The shape of one chunk, `[B, C, chunk_size, h, w]`.
        num_chunks: The number of chunks of the whole result; None for an endless one.
        num_condition_chunks: How many of them are those of a video that is continued.
        plans: A shot plan for each prompt; None where `prompt_embeds` are given.
        is_single: Whether the caller asked for one video, not for a batch.
        num_prompts, num_videos_per_prompt: Their product is the size of the batch.
        prompt_embeds, negative_prompt_embeds, negative_prompt: As the caller gave them.
        noise: The initial noise of all new frames, or None.
        image, video: Pixels in [-1, 1] to begin with, or None.
        image_latents, video_latents: Normalized latents to begin with, or None.
        callback: Called after every solver step as `callback(pipe, step, timestep, tensors)`, or None.
        callback_tensor_inputs: The names of the tensors that it gets.

    The other fields are arguments of `LongLivePipeline.stream`, completed with the pipeline's settings.
    """

    latent_shape: tuple[int, int, int, int, int]
    num_chunks: int | None
    num_condition_chunks: int
    plans: list[ShotPlan] | None
    is_single: bool
    num_prompts: int
    num_videos_per_prompt: int
    prompt_embeds: torch.Tensor | None
    negative_prompt: str | list[str] | None
    negative_prompt_embeds: torch.Tensor | None
    max_sequence_length: int
    noise: torch.Tensor | None
    image: torch.Tensor | None
    video: torch.Tensor | None
    image_latents: torch.Tensor | None
    video_latents: torch.Tensor | None
    num_inference_steps: int
    guidance_scale: float
    generator: torch.Generator | list[torch.Generator] | None
    window_size: int
    sink_size: int
    multi_shot_sink: bool
    multi_shot_rope_offset: float
    relative_rope: bool
    kv_cache_dtype: torch.dtype | str | None
    clean_pass: str
    attention_density: float
    attention_kwargs: dict[str, Any] | None
    callback: Callable | PipelineCallback | MultiPipelineCallbacks | None
    callback_tensor_inputs: tuple[str, ...]
    output_type: str
    decoder: TinyVideoDecoder | None
    async_decode: bool
    split_first_chunk: bool

    @property
    def batch_size(self) -> int:
        return self.latent_shape[0]

    @property
    def chunk_size(self) -> int:
        return self.latent_shape[2]

    @property
    def num_new_chunks(self) -> int | None:
        """The number of chunks to be made; None for an endless video."""
        return None if self.num_chunks is None else self.num_chunks - self.num_condition_chunks

    def for_each_sample(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Call [`for_each_sample`] for this request's batch."""
        return for_each_sample(name, tensor, self.num_prompts, self.num_videos_per_prompt)


def resolve_request(
    sizes: ModelSizes,
    settings: Mapping[str, Any],
    *,
    is_offloaded: bool,
    prompt,
    shot_prompts,
    chunks_per_shot,
    image,
    video,
    negative_prompt,
    height,
    width,
    num_frames,
    num_inference_steps,
    guidance_scale,
    num_videos_per_prompt,
    generator,
    latents,
    image_latents,
    video_latents,
    prompt_embeds,
    negative_prompt_embeds,
    window_size,
    sink_size,
    multi_shot_sink,
    multi_shot_rope_offset,
    relative_rope,
    kv_cache_dtype,
    clean_pass,
    attention_density,
    output_type,
    attention_kwargs,
    callback_on_step_end,
    callback_on_step_end_tensor_inputs,
    max_sequence_length,
    decoder,
    async_decode,
    split_first_chunk,
) -> Request:
    """
    Check the arguments of `LongLivePipeline.stream`, and complete them with the pipeline's settings.

    Args:
        sizes: The sizes of the networks.
        settings: The pipeline's configuration (`window_size`, ...), for settings that are None here.
        is_offloaded: Whether the models are moved to the device one at a time.

    All other arguments are those of `LongLivePipeline.stream`.

    Raises:
        ValueError: If anything is malformed; the message states the numbers.
    """
    # 1. Settings, by themselves.
    given_rope_offset = multi_shot_rope_offset
    window_size, sink_size, multi_shot_sink, multi_shot_rope_offset = (
        settings[name] if value is None else value
        for name, value in (
            ("window_size", window_size),
            ("sink_size", sink_size),
            ("multi_shot_sink", multi_shot_sink),
            ("multi_shot_rope_offset", multi_shot_rope_offset),
        )
    )
    callback_tensor_inputs = resolve_callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
    check_counts(
        num_inference_steps=num_inference_steps,
        num_videos_per_prompt=num_videos_per_prompt,
        max_sequence_length=max_sequence_length,
    )
    check_booleans(multi_shot_sink=multi_shot_sink, async_decode=async_decode, split_first_chunk=split_first_chunk)
    if relative_rope is not None:
        check_booleans(relative_rope=relative_rope)
    check_non_negative(at_most=MAX_GUIDANCE_SCALE, guidance_scale=guidance_scale)
    check_non_negative(at_most=MAX_ROPE_OFFSET, multi_shot_rope_offset=multi_shot_rope_offset)
    check_output_type(output_type)
    check_decoder(decoder, sizes)
    check_attention_kwargs(attention_kwargs)
    check_clean_pass(clean_pass)
    check_density(attention_density)
    if kv_cache_dtype is not None:
        kv_cache_dtype = resolve_kv_cache_dtype(kv_cache_dtype, sizes.head_dim)
    check_window(window_size, sink_size, sizes.chunk_size, multi_shot_sink)
    if async_decode and is_offloaded:
        raise ValueError("`async_decode` runs two models at once; offloading keeps one on the device. Choose one.")

    # 2. What the videos show.
    prompts = resolve_prompts(
        prompt, shot_prompts, chunks_per_shot, prompt_embeds, negative_prompt, negative_prompt_embeds, sizes.text_dim
    )
    num_prompts = prompt_embeds.shape[0] if prompts is None else len(prompts.videos)
    batch_size = num_prompts * num_videos_per_prompt
    check_generator(generator, batch_size)

    # 3. What they begin with, and their size.
    check_conditions(image=image, video=video, image_latents=image_latents, video_latents=video_latents)
    check_latents("latents", latents, sizes.latent_channels, sizes.chunk_size)
    check_latents("image_latents", image_latents, sizes.latent_channels, None)
    check_latents("video_latents", video_latents, sizes.latent_channels, sizes.chunk_size)
    given = {"latents": latents, "image_latents": image_latents, "video_latents": video_latents}
    size = resolve_size(height, width, given, sizes.sample_size, sizes.spatial_scale, sizes.patch_size)
    if image is not None:
        image = image_to_pixels(image, size.height, size.width)
    if video is not None:
        video = video_to_pixels(video, size.height, size.width, sizes.chunk_size, sizes.temporal_scale)
    tensors = {
        name: None if tensor is None else for_each_sample(name, tensor, num_prompts, num_videos_per_prompt)
        for name, tensor in {**given, "image": image, "video": video}.items()
    }

    # 4. Their length.
    num_condition_frames = 0 if video_latents is None else video_latents.shape[2]
    if video is not None:
        num_condition_frames = latent_frames(video.shape[2], temporal_scale=sizes.temporal_scale)
    num_condition_chunks = num_condition_frames // sizes.chunk_size
    num_chunks = resolve_num_chunks(num_frames, latents, num_condition_frames, sizes.chunk_size, sizes.temporal_scale)
    num_new_chunks = None if num_chunks is None else num_chunks - num_condition_chunks
    if relative_rope is None:
        relative_rope = num_chunks is None
    if relative_rope and given_rope_offset:
        logger.warning(
            f"`multi_shot_rope_offset` {given_rope_offset} has no effect: with `relative_rope`, as in a video without "
            "an end, time positions are counted from the cached frames alone."
        )
    return Request(
        latent_shape=(batch_size, sizes.latent_channels, sizes.chunk_size, size.latent_height, size.latent_width),
        num_chunks=num_chunks,
        num_condition_chunks=num_condition_chunks,
        plans=None if prompts is None else prompts.plans(num_new_chunks),
        is_single=batch_size == 1 and (prompts is None or prompts.is_single),
        num_prompts=num_prompts,
        num_videos_per_prompt=num_videos_per_prompt,
        prompt_embeds=prompt_embeds,
        negative_prompt=negative_prompt,
        negative_prompt_embeds=negative_prompt_embeds,
        max_sequence_length=max_sequence_length,
        noise=tensors["latents"],
        image=tensors["image"],
        video=tensors["video"],
        image_latents=tensors["image_latents"],
        video_latents=tensors["video_latents"],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generator,
        window_size=window_size,
        sink_size=sink_size,
        multi_shot_sink=multi_shot_sink,
        multi_shot_rope_offset=multi_shot_rope_offset,
        relative_rope=relative_rope,
        kv_cache_dtype=kv_cache_dtype,
        clean_pass=clean_pass,
        attention_density=attention_density,
        attention_kwargs=attention_kwargs,
        callback=callback_on_step_end,
        callback_tensor_inputs=callback_tensor_inputs,
        output_type=output_type,
        decoder=decoder,
        async_decode=async_decode,
        split_first_chunk=split_first_chunk,
    )


# ------------------------------------------------------------------------------------------------------------- prompts
def resolve_prompts(
    prompt, shot_prompts, chunks_per_shot, prompt_embeds, negative_prompt, negative_prompt_embeds, text_dim: int
) -> Prompts | None:
    """Resolve the prompts to one list of shot prompts for each video; None where `prompt_embeds` are given.

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
        raise ValueError(f"`negative_prompt` has {counted(len(negative_prompt), 'prompt')} for a batch of {batch}.")
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
        raise ValueError(
            f"`chunks_per_shot` has {counted(len(chunks_per_shot), 'list')} for a batch of {len(videos)}."
        )
    return Prompts(videos, chunks_per_shot, is_single)


def _strings(name: str, value) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` must be a string or a list of at least one string, got {value!r}.")
    for item in value:
        if not isinstance(item, str):
            raise ValueError(f"`{name}` must hold strings, got {type(item).__name__} {item!r}.")
    return value


def check_embeds(name: str, embeds: torch.Tensor, text_dim: int | None) -> None:
    """Raise a ValueError unless embeddings are finite floats `[B, L, text_dim]` (of any dimension if it is None)."""
    is_tensor = isinstance(embeds, torch.Tensor)
    if is_tensor:
        check_floats(f"`{name}`", embeds)
    if not is_tensor or embeds.ndim != 3 or 0 in embeds.shape or embeds.shape[-1] != (text_dim or embeds.shape[-1]):
        shape = tuple(embeds.shape) if is_tensor else type(embeds).__name__
        raise ValueError(f"`{name}` must be [B, L, {text_dim or 'D'}], got {shape}.")
    check_finite(f"`{name}`", embeds)


# ----------------------------------------------------------------------------------------------------- size and length
def check_decoder(decoder: TinyVideoDecoder | None, sizes: ModelSizes) -> None:
    """Raise a ValueError unless a decoder that stands in for the VAE's is for latents of these sizes."""
    if decoder is None:
        return
    if not isinstance(decoder, TinyVideoDecoder):
        raise ValueError(f"`decoder` must be a TinyVideoDecoder, or None for the VAE, got {type(decoder).__name__}.")
    own = (decoder.config["latent_channels"], decoder.spatial_scale, decoder.temporal_scale)
    needed = (sizes.latent_channels, sizes.spatial_scale, sizes.temporal_scale)
    if own != needed:
        own, needed = (
            f"{channels} channels that span {space}x{space} pixels and {time} frames"
            for channels, space, time in (own, needed)
        )
        raise ValueError(f"`decoder` is for latents of {own}; this pipeline's have {needed}.")


def check_latents(name: str, latents: torch.Tensor | None, channels: int, chunk_size: int | None) -> None:
    """Raise a ValueError unless latents have a positive multiple of `chunk_size` frames (one frame if it is None)."""
    if latents is None:
        return
    if isinstance(latents, torch.Tensor):
        check_floats(f"`{name}`", latents)
    if not isinstance(latents, torch.Tensor) or latents.ndim != 5 or latents.shape[1] != channels:
        shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"`{name}` must be [B, {channels}, F, h, w], got {shape}.")
    if 0 in latents.shape:
        raise ValueError(f"`{name}` must hold at least one number, got shape {tuple(latents.shape)}.")
    frames = latents.shape[2]
    if chunk_size is None and frames != 1:
        raise ValueError(f"`{name}` must have 1 latent frame, got {frames}.")
    if chunk_size is not None and (frames < 1 or frames % chunk_size):
        raise ValueError(f"`{name}` must have a multiple of {chunk_size} latent frames (whole chunks), got {frames}.")
    check_finite(f"`{name}`", latents)


def resolve_size(
    height: int | None,
    width: int | None,
    given: dict[str, torch.Tensor | None],
    default: tuple[int, int],
    scale: int,
    patch: tuple[int, int],
) -> VideoSize:
    """Resolve the size of a video from the requested size, the `given` latents or the model's default.

    Args:
        height, width: The requested size in pixels, or None.
        given: The latents that the caller passed, by name; None for those that were not.
        default: The default height and width, in latents.
        scale: How many pixels a latent spans along each side.
        patch: The height and width of a token, in latents.

    Raises:
        ValueError: For a size that is not a multiple of a token's or is beyond `MAX_SIDE`, or latents of another
            size than the requested one.
    """
    sizes = {name: tuple(latents.shape[-2:]) for name, latents in given.items() if latents is not None}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Latents of different sizes: {sizes}.")
    latent_height, latent_width = next(iter(sizes.values()), default)
    multiple = (scale * patch[0], scale * patch[1])
    for name, value, step in (("height", height, multiple[0]), ("width", width, multiple[1])):
        if value is not None and (not is_count(value) or not step <= value <= MAX_SIDE or value % step):
            raise ValueError(
                f"`{name}` must be an integer, a multiple of {step} from {step} to {MAX_SIDE}, got {value!r}."
            )
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
    """Resolve the number of chunks of the whole result, including a conditioning video; None for an endless stream.

    Args:
        num_frames: The requested number of pixel frames, rounded up to whole chunks with a warning; None for an
            endless stream.
        latents: The initial noise of the new frames, which decides where it is given.
        condition_frames: The number of latent frames of the video that is continued.
        chunk_size: The number of latent frames in a chunk.
        temporal_scale: The number of pixel frames that a latent frame stands for.
    """
    if latents is not None:
        return (latents.shape[2] + condition_frames) // chunk_size
    if num_frames is None:
        return None
    check_counts(num_frames=num_frames)
    if num_frames > MAX_FRAMES:
        raise ValueError(f"`num_frames` must be at most {MAX_FRAMES} (None is endless), got {num_frames!r}.")
    num_chunks = chunks_to_cover(num_frames, chunk_size, temporal_scale=temporal_scale)
    rounded = pixel_frames(num_chunks * chunk_size, temporal_scale=temporal_scale)
    if num_chunks * chunk_size <= condition_frames:
        raise ValueError(
            f"`num_frames` counts the whole result: with {num_frames}, there is nothing to add to a video of "
            f"{counted(pixel_frames(condition_frames, temporal_scale=temporal_scale), 'frame')}."
        )
    if rounded != num_frames:
        logger.warning(
            f"`num_frames` {num_frames} is not a whole number of chunks of {chunk_size} latent frames; "
            f"using {counted(rounded, 'frame')} ({counted(num_chunks, 'chunk')})."
        )
    return num_chunks


def for_each_sample(name: str, tensor: torch.Tensor, num_prompts: int, num_videos_per_prompt: int) -> torch.Tensor:
    """Expand a tensor `[1, ...]`, `[num_prompts, ...]` or `[B, ...]` to `[B, ...]`: one value may serve all prompts,
    and that of a prompt all of its videos."""
    batch_size = num_prompts * num_videos_per_prompt
    if tensor.shape[0] == batch_size:
        return tensor
    if tensor.shape[0] == num_prompts:
        return tensor.repeat_interleave(num_videos_per_prompt, dim=0)
    if tensor.shape[0] == 1:
        return tensor.expand(batch_size, *tensor.shape[1:])
    raise ValueError(
        f"`{name}` has batch size {tensor.shape[0]}; it must be {alternatives((1, num_prompts, batch_size))} for "
        f"{counted(num_prompts, 'prompt')} and {counted(num_videos_per_prompt, 'video')} of each."
    )


# ------------------------------------------------------------------------------------------------------------- options
def check_generator(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for item in generators:
        if not isinstance(item, torch.Generator):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {type(item).__name__}.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` has {counted(len(generator), 'generator')} for a batch of {counted(batch_size, 'video')}."
        )


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")


def describe_request(request: Request) -> dict[str, Any]:
    """Return what several ranks must ask for alike to make one video together. What is said and drawn, prompts, noise
    and conditions, may differ: that of the first rank is used."""
    tensors = ("prompt_embeds", "negative_prompt_embeds", "noise", "image", "video", "image_latents", "video_latents")
    others = ("plans", "negative_prompt", "generator", "callback", "callback_tensor_inputs", "decoder")
    names = [field.name for field in fields(request) if field.name not in (*tensors, *others)]
    described = {name: getattr(request, name) for name in names}
    return {**described, "decoder": "the VAE" if request.decoder is None else "a tiny decoder"}
