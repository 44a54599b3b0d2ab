"""LongLivePipeline: text, shots, images or video in; a video out, whole or chunk by chunk while it is made."""

import html
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    SchedulerMixin,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import _get_model_file, logging, replace_example_docstring
from diffusers.video_processor import VideoProcessor
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ..loaders.hub import load_model_card, render_model_card
from ..loaders.lora import is_original_lora, read_original_lora
from ..loaders.saved_configs import forget_origin
from ..models.kv_cache import check_window
from ..models.streaming_vae import StreamingDecoder, StreamingEncoder, denormalize_latents, normalize_latents
from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..schedulers.scheduling_longlive import LongLiveScheduler
from . import inputs
from .denoiser import ChunkDenoiser, DenoiseSettings, RunState, is_guided
from .pipeline_output import Frames, LongLivePipelineOutput, join_frames
from .prompt_source import PromptSource
from .session import StreamingSession


logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> import torch, longlive_diffusers
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers.utils import export_to_video

        >>> pipe = DiffusionPipeline.from_pretrained("path/or/repo", dtype=torch.bfloat16).to("cuda")
        >>> video = pipe("A lighthouse in a storm", num_frames=125).frames[0]
        >>> export_to_video(video, "lighthouse.mp4", fps=24)

        >>> with pipe.stream("A lighthouse in a storm") as session:  # no end
        ...     for chunk in session:
        ...         show(chunk.frames)
        ...         if chunk.index == 3:
        ...             session.prompt = "A lighthouse at dawn, the storm is over"
        ...         if chunk.index == 9:
        ...             break
        ```
"""


class LongLivePipeline(DiffusionPipeline, WanLoraLoaderMixin):
    r"""
    Real-time, multi-shot, endless video with LongLive-2.0 (arXiv 2605.18739).

    Args:
        tokenizer, text_encoder: UMT5.
        vae: Wan2.2's VAE.
        transformer: The chunk-causal network; a `WanTransformer3DModel` is taken as one.
        scheduler: [`LongLiveScheduler`]; Wan's UniPC is taken as one with its shift, others as they are.
        window_size: Latent frames that the KV cache holds.
        sink_size: First frames of the video that it never forgets.
        multi_shot_sink: Also keep the frames that opened the current shot.
        multi_shot_rope_offset: Distance in time positions between two shots, on top of the frames between them.
        scene_cut_prefix: Put before the prompt of the chunk that opens a shot, but for the first.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "vae"]  # embeddings in, latents out
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        transformer: LongLiveTransformer3DModel | WanTransformer3DModel,
        scheduler: SchedulerMixin,
        window_size: int = 32,
        sink_size: int = 8,
        multi_shot_sink: bool = True,
        multi_shot_rope_offset: float = 8.0,
        scene_cut_prefix: str = "The scene transitions. ",
    ):
        super().__init__()
        # Conversions by others have the layout of a Wan pipeline; UniPC's own grid is not the one this model learnt.
        if isinstance(transformer, WanTransformer3DModel):
            transformer = LongLiveTransformer3DModel.from_wan(transformer)
        if type(scheduler) is UniPCMultistepScheduler:
            scheduler = LongLiveScheduler(flow_shift=scheduler.config.flow_shift)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(
            window_size=window_size,
            sink_size=sink_size,
            multi_shot_sink=multi_shot_sink,
            multi_shot_rope_offset=multi_shot_rope_offset,
            scene_cut_prefix=scene_cut_prefix,
        )
        self.vae_scale_factor_temporal = vae.config.scale_factor_temporal if vae is not None else 4
        self.vae_scale_factor_spatial = vae.config.scale_factor_spatial if vae is not None else 16
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        self._run = RunState(guidance_scale=1.0, num_timesteps=0, attention_kwargs=None)

    # -- what callbacks read and change: the state of the session that is advancing ----------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._run.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return is_guided(self._run.guidance_scale)

    @property
    def num_timesteps(self) -> int:
        return self._run.num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._run.current_timestep

    @property
    def interrupt(self) -> bool:
        return self._run.interrupt

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._run.attention_kwargs

    # diffusers' own callbacks write these two.
    @property
    def _guidance_scale(self) -> float:
        return self._run.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._run.guidance_scale = value

    @property
    def _interrupt(self) -> bool:
        return self._run.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._run.interrupt = value

    @property
    def is_offloaded(self) -> bool:
        """Whether hooks move the models between devices while they run."""
        models = (self.text_encoder, self.transformer, self.vae)
        return any("_hf_hook" in model.__dict__ for model in models if model is not None)

    @property
    def vae_device(self) -> torch.device:
        """Where the VAE works: where the user moved it, perhaps a second device; if offloaded, where all else runs."""
        offloaded = self.is_offloaded or _is_group_offload_enabled(self.vae)
        return self._execution_device if offloaded else self.vae.device

    # -- generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        shot_prompts: list[str] | list[list[str]] | None = None,
        chunks_per_shot: int | list[int] | list[list[int]] | None = None,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list | None = None,
        video: list | np.ndarray | torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 125,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
        video_latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        window_size: int | None = None,
        sink_size: int | None = None,
        multi_shot_sink: bool | None = None,
        multi_shot_rope_offset: float | None = None,
        relative_rope: bool = False,
        kv_cache_dtype: torch.dtype | str | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
        max_sequence_length: int = 512,
    ) -> LongLivePipelineOutput | tuple:
        r"""
        Make a video.

        Args:
            prompt: What it shows; a list makes a batch.
            shot_prompts: Instead of `prompt`: one prompt for each shot; a list of such lists makes a batch.
            chunks_per_shot: How long each shot lasts, in chunks: one number, one for each shot, or a list for each
                video. Without it, the video is divided evenly.
            image: Its first frame (image to video).
            video: A video to continue; the result begins with it. Frames that do not fill whole chunks are dropped
                from its beginning, with a warning.
            negative_prompt: What it should not show; used where `guidance_scale` is neither 1 nor 0.
            height, width: In pixels; the model's own by default.
            num_frames: Of the whole result; rounded up to whole chunks, with a warning.
            num_inference_steps: Solver steps of each chunk: 4 or 2 for distilled models, 30 to 50 for others.
            guidance_scale: 1 (or 0: none) for distilled models, about 3 for others.
            num_videos_per_prompt: Videos made for each prompt.
            generator: Random state; a list has one for each video.
            latents: Initial noise of all new frames `[B, C, F, h, w]`; its F decides the length.
            image_latents, video_latents: Normalised latents `[B, C, 1, h, w]`, `[B, C, F0, h, w]` in place of `image`
                and `video`.
            prompt_embeds, negative_prompt_embeds: `[B, L, D]`, in place of prompts.
            window_size, sink_size, multi_shot_sink, multi_shot_rope_offset: In place of the pipeline's.
            relative_rope: Count time positions from the cached frames.
            kv_cache_dtype: How keys and values are stored: a dtype, "nvfp4" or "fp8"; the transformer's dtype by
                default.
            output_type: "np", "pt", "pil", or "latent" (normalised latents).
            return_dict: Return a `LongLivePipelineOutput` instead of a tuple.
            attention_kwargs: `{"scale": s}` scales the LoRA.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after every solver step, with
                steps counted over all chunks; may return changed tensors.
            callback_on_step_end_tensor_inputs: Which tensors it gets.
            max_sequence_length: Tokens that a prompt is padded or cut to, at most the tokenizer's `model_max_length`.

        Examples:

        Returns:
            [`LongLivePipelineOutput`], or `(frames,)`.

        Raises:
            ValueError: For anything malformed, stating the numbers, before any long work.
        """
        # Not one of these is used here but to hand it on; naming each again would only invite one to be forgotten.
        options = {name: value for name, value in locals().items() if name not in ("self", "return_dict")}
        if num_frames is None and latents is None:
            raise ValueError("`num_frames` None is an endless video: use `pipe.stream(...)`.")
        # With offloading, decoding each chunk as it comes would move the transformer in and out for every one.
        decode_later = self.is_offloaded and output_type != "latent"
        if decode_later:
            inputs.check_output_type(output_type)
            options["output_type"] = "latent"
        with self.stream(**options) as session:
            frames = join_frames([chunk.frames for chunk in session], options["output_type"])
        if decode_later:
            frames = self.decode_latents(frames, output_type)
        return LongLivePipelineOutput(frames) if return_dict else (frames,)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str] | None = None,
        *,
        shot_prompts: list[str] | list[list[str]] | None = None,
        chunks_per_shot: int | list[int] | list[list[int]] | None = None,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list | None = None,
        video: list | np.ndarray | torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
        video_latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        window_size: int | None = None,
        sink_size: int | None = None,
        multi_shot_sink: bool | None = None,
        multi_shot_rope_offset: float | None = None,
        relative_rope: bool | None = None,
        kv_cache_dtype: torch.dtype | str | None = None,
        output_type: str = "np",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
        max_sequence_length: int = 512,
        async_decode: bool = False,
    ) -> StreamingSession:
        r"""
        Begin a video that is handed over chunk by chunk, as it is made. Arguments are those of `__call__`, but for:

        Args:
            num_frames: None: the video has no end.
            relative_rope: None: with an endless video only.
            async_decode: Denoise the next chunk in a thread of its own while this one is decoded (on a GPU on a stream
                of its own, or on the device that the VAE was moved to). The frames are the same; prompt switches
                take effect a chunk or two later.

        Returns:
            A [`StreamingSession`]: iterate it, change its `prompt`, `cut()` to a new shot, and close it.
        """
        # 1. Check everything that can be checked without work.
        config = self.config
        window_size = config.window_size if window_size is None else window_size
        sink_size = config.sink_size if sink_size is None else sink_size
        multi_shot_sink = config.multi_shot_sink if multi_shot_sink is None else multi_shot_sink
        if multi_shot_rope_offset is None:
            multi_shot_rope_offset = config.multi_shot_rope_offset
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        inputs.check_options(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            max_sequence_length=max_sequence_length,
            multi_shot_rope_offset=multi_shot_rope_offset,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            kv_cache_dtype=kv_cache_dtype,
            head_dim=self.transformer.config.attention_head_dim,
            callback_inputs=callback_on_step_end_tensor_inputs,
            allowed_callback_inputs=self._callback_tensor_inputs,
        )
        chunk_size, channels = self.transformer.config.chunk_size, self.transformer.config.in_channels
        check_window(window_size, sink_size, chunk_size, multi_shot_sink)
        if self.vae is not None and self.vae.config.z_dim != channels:
            raise ValueError(f"The transformer's latents have {channels} channels, the VAE's {self.vae.config.z_dim}.")
        prompts = inputs.resolve_prompts(
            prompt,
            shot_prompts,
            chunks_per_shot,
            prompt_embeds,
            negative_prompt,
            negative_prompt_embeds,
            self.transformer.config.text_dim,
        )
        batch = prompt_embeds.shape[0] if prompts is None else len(prompts.videos)
        rows = batch * num_videos_per_prompt
        inputs.check_generator(generator, rows)
        inputs.check_conditions(image, video, image_latents, video_latents)
        inputs.check_latents("latents", latents, channels, chunk_size)
        inputs.check_latents("image_latents", image_latents, channels, None)
        inputs.check_latents("video_latents", video_latents, channels, chunk_size)
        size = inputs.resolve_size(
            height,
            width,
            {"latents": latents, "image_latents": image_latents, "video_latents": video_latents},
            (self.transformer.config.sample_height, self.transformer.config.sample_width),
            self.vae_scale_factor_spatial,
            self.transformer.config.patch_size[1:],
        )
        if async_decode and self.is_offloaded:
            raise ValueError("`async_decode` runs two models at once; offloading keeps one on the device. Choose one.")
        if image is not None:
            image = inputs.image_to_pixels(image, self.video_processor, size)
        if video is not None:
            video = inputs.video_to_pixels(
                video, self.video_processor, size, chunk_size, self.vae_scale_factor_temporal
            )
        condition_frames = inputs.condition_frames(video, video_latents, self.vae_scale_factor_temporal)
        num_chunks = inputs.resolve_num_chunks(
            num_frames, latents, condition_frames, chunk_size, self.vae_scale_factor_temporal
        )
        num_new_chunks = None if num_chunks is None else num_chunks - condition_frames // chunk_size
        plans = None if prompts is None else prompts.plans(num_new_chunks, num_videos_per_prompt)
        for_rows = lambda name, tensor: inputs.for_each_video(name, tensor, batch, num_videos_per_prompt)  # noqa: E731
        given = {"latents": latents, "image": image, "video": video, "image_latents": image_latents}
        given |= {"video_latents": video_latents}
        given = {name: for_rows(name, tensor) for name, tensor in given.items() if tensor is not None}

        # 2. Encode the prompts.
        device = self._execution_device
        if prompt_embeds is not None:
            prompt_embeds = for_rows("prompt_embeds", prompt_embeds).to(device, self.transformer.dtype)
        if is_guided(guidance_scale):
            if negative_prompt_embeds is None:
                negative_prompt_embeds = self._embed_negative_prompts(negative_prompt, batch, max_sequence_length)
            negative_prompt_embeds = for_rows("negative_prompt_embeds", negative_prompt_embeds)
            negative_prompt_embeds = negative_prompt_embeds.to(device, self.transformer.dtype)
        else:
            negative_prompt_embeds = None
        source = PromptSource(
            plans,
            lambda texts: self._embed_prompts(texts, max_sequence_length),
            fixed=prompt_embeds,
            negative=negative_prompt_embeds,
            rows=rows,
            scene_cut_prefix=config.scene_cut_prefix,
            num_new_chunks=num_new_chunks,
            continues=condition_frames > 0,
        )

        # 3. Encode the image, or the video to continue.
        image_latents, video_latents = given.get("image_latents"), given.get("video_latents")
        if image is not None:
            image_latents = self.encode_video(given["image"])
        if video is not None:
            video_latents = self.encode_video(given["video"])
        if image_latents is not None:
            image_latents = image_latents.to(device, torch.float32)

        # 4. The session does the rest.
        denoiser = ChunkDenoiser(
            self,
            DenoiseSettings(
                latent_shape=(rows, channels, chunk_size, size.latent_height, size.latent_width),
                num_chunks=num_chunks,
                num_inference_steps=num_inference_steps,
                window_size=window_size,
                sink_size=sink_size,
                multi_shot_sink=multi_shot_sink,
                multi_shot_rope_offset=multi_shot_rope_offset,
                relative_rope=num_chunks is None if relative_rope is None else relative_rope,
                kv_cache_dtype=kv_cache_dtype,
                callback=callback_on_step_end,
                callback_inputs=tuple(callback_on_step_end_tensor_inputs or ()),
            ),
            source,
            guidance_scale=guidance_scale,
            attention_kwargs=attention_kwargs,
            generator=generator,
            noise=given.get("latents"),
            image_latents=image_latents,
            video_latents=video_latents,
        )
        is_single = rows == 1 and (prompts is None or prompts.is_single)
        return StreamingSession(
            self, denoiser, output_type=output_type, is_single=is_single, async_decode=async_decode
        )

    # -- parts that are useful by themselves -------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 512,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Text embeddings, zero beyond the end of each prompt; what `__call__` takes as `prompt_embeds`.

        Returns:
            Those of the prompts and, with guidance, of the negative prompts, each
            `[B * num_videos_per_prompt, max_sequence_length, D]`.
        """
        if prompt_embeds is None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds = self._embed_prompts(prompt, max_sequence_length, device, dtype)
            prompt_embeds = prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            batch = prompt_embeds.shape[0] // num_videos_per_prompt
            negative_prompt_embeds = self._embed_negative_prompts(
                negative_prompt, batch, max_sequence_length, device, dtype
            )
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    @torch.no_grad()
    def encode_video(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `[B, 3, 1 + 4 n, H, W]` in [-1, 1] -> normalised latents `[B, C, 1 + n, h, w]`, float32."""
        encoder = StreamingEncoder(self.vae)
        groups = [pixels[:, :, :1], *pixels[:, :, 1:].split(self.vae_scale_factor_temporal, dim=2)]
        latents = [encoder.encode(group.to(self.vae_device, self.vae.dtype)) for group in groups if group.shape[2]]
        return normalize_latents(self.vae, torch.cat(latents, dim=2).float())

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "np") -> Frames:
        """Normalised latents `[B, C, F, h, w]` of whole videos -> frames; in memory that does not depend on F."""
        inputs.check_output_type(output_type)
        decoder, chunk_size = StreamingDecoder(self.vae), self.transformer.config.chunk_size
        frames = [self.decode_chunk(decoder, chunk, output_type) for chunk in latents.split(chunk_size, dim=2)]
        self.maybe_free_model_hooks()
        return join_frames(frames, output_type)

    def decode_chunk(self, decoder: StreamingDecoder, latents: torch.Tensor, output_type: str) -> Frames:
        """The next chunk of normalised latents -> frames, where the VAE is (or is brought to)."""
        latents = denormalize_latents(self.vae, latents).to(self.vae_device, self.vae.dtype)
        return self.video_processor.postprocess_video(decoder.decode(latents), output_type=output_type)

    def _embed_prompts(
        self,
        prompts: list[str],
        max_sequence_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """`[n, max_sequence_length, D]`, or less where the tokenizer's own limit is lower; by default where and in the
        dtype that the transformer runs."""
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(f"{len(prompts)} prompts, but no tokenizer or text encoder: pass `prompt_embeds`.")
        device = device or self._execution_device
        dtype = dtype or (self.text_encoder.dtype if self.transformer is None else self.transformer.dtype)
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=min(max_sequence_length, self.tokenizer.model_max_length),
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask
        embeds = self.text_encoder(tokens.input_ids.to(device), mask.to(device)).last_hidden_state
        return (embeds * mask.to(device, embeds.dtype)[..., None]).to(device, dtype)

    def _embed_negative_prompts(
        self, negative_prompt: str | list[str] | None, batch: int, max_sequence_length: int, device=None, dtype=None
    ) -> torch.Tensor:
        """`[batch, max_sequence_length, D]`: one for all, one for each prompt, or (None) the empty prompt."""
        prompts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * batch
        if len(prompts) != batch:
            raise ValueError(f"`negative_prompt` has {len(prompts)} prompts for a batch of {batch}.")
        return self._embed_prompts(prompts, max_sequence_length, device, dtype)

    # -- sharing -----------------------------------------------------------------------------------------------------

    def model_card(self, repo_id: str, **details) -> ModelCard:
        """A model card for this pipeline: what it is, which package loads it, and a usage example with its own sizes.

        Args:
            repo_id: Where it will be; `user/name`.
            details: Of `loaders.hub.render_model_card`, for instance `base_model`, `license`, `tags`.
        """
        scale, config = self.vae_scale_factor_spatial, self.transformer.config
        sizes = {"height": config.sample_height * scale, "width": config.sample_width * scale}
        return render_model_card(repo_id, chunk_size=config.chunk_size, **{**sizes, **details})

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in diffusers, but nothing that is written names a folder of this machine; a folder without a README.md
        also gets one, which says which package loads it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        forget_origin(save_directory, self.components)
        readme = Path(save_directory) / "README.md"
        if not readme.exists() and self.transformer is not None:
            self.model_card(Path(save_directory).name).save(readme)

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, token: str | None = None, **kwargs):
        """The one way to the Hub: `push_to_hub` and `save_pretrained(push_to_hub=True)` both come through here, with
        diffusers' placeholder of a card; a card that is on the Hub already is the owner's, and kept."""
        if load_model_card(repo_id, token=token) is None:
            self.model_card(repo_id).save(Path(working_dir) / "README.md")
        forget_origin(working_dir, self.components)
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """As in diffusers; LongLive's own LoRA files (`lora.pt`) are read as well, by themselves or, by their
        `weight_name`, from a folder or a repository of the Hub."""
        source, weight_name = pretrained_model_name_or_path_or_dict, kwargs.get("weight_name")
        if weight_name is not None and weight_name.endswith((".pt", ".pth")) and not isinstance(source, dict):
            names = ("subfolder", "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
            options = {name: kwargs[name] for name in names if name in kwargs}
            source = _get_model_file(source, weights_name=weight_name, **options)
        if is_original_lora(source):
            source = read_original_lora(source)
        return super().lora_state_dict(source, **kwargs)


def clean_prompt(prompt: str) -> str:
    """Undo HTML escapes and collapse white space, as the model's captions were."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()
