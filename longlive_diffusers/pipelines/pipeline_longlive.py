"""LongLivePipeline: text, shots, images or video in; a video out, complete or chunk by chunk while it is made."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
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
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import unwrap_module
from diffusers.video_processor import VideoProcessor
from huggingface_hub import ModelCard
from torch.distributed import ProcessGroup
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ..loaders.lora import check_lora_fits, read_lora
from ..loaders.lora_file import LoraFile, find_lora_file, read_lora_file
from ..models.altered_layers import check_can_be_saved, check_takes_lora
from ..models.streaming_vae import encode_video
from ..models.tiny_decoder import TinyVideoDecoder
from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..number_checks import check_booleans, check_counts
from ..nvfp4.linear import nvfp4_layers, weights_of
from ..parallel.agreement import Agreement
from ..parallel.stream_ranks import StreamRanks
from ..schedulers.scheduling_longlive import LongLiveScheduler
from ..setting_types import check_setting_types
from ..wording import counted
from .async_workers import AsyncWorkers
from .callbacks import CALLBACK_TENSOR_INPUTS
from .chunk_step import is_guided
from .component_checks import check_components, check_has_transformer
from .decoder import ChunkDecoder
from .denoiser import ChunkDenoiser
from .inputs import (
    ModelSizes,
    Request,
    check_decoder,
    check_embeds,
    check_latents,
    check_output_type,
    describe_request,
    for_each_sample,
    resolve_request,
)
from .memory import check_caches_fit, check_result_fits
from .pipeline_output import Frames, LongLivePipelineOutput, join_frames
from .prompt_cleaning import clean_prompt, describe_cuts
from .prompt_source import PromptSource
from .run_state import RunView
from .session import StreamingSession
from .sharing import load_model_card, render_model_card, strip_local_paths
from .speed import SpeedPlan, optimize


logger = logging.get_logger(__name__)

DEFAULT_MAX_SEQUENCE_LENGTH = 512  # what Wan was trained with, and the default of every method here

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> import torch, longlive_diffusers
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers.utils import encode_video

        >>> pipe = DiffusionPipeline.from_pretrained("path/or/repo", dtype=torch.bfloat16).to("cuda")
        >>> video = pipe("A lighthouse in a storm", num_frames=125).frames[0]
        >>> encode_video(video, fps=24, output_path="lighthouse.mp4")

        >>> with pipe.stream("A lighthouse in a storm") as session:  # no end
        ...     for chunk in session:
        ...         show(chunk.frames)
        ...         if chunk.index == 3:
        ...             session.prompt = "A lighthouse at dawn, the storm is over"
        ...         if chunk.index == 9:
        ...             break
        ```
"""


def _run_property(name: str, *, writable: bool = False) -> property:
    """A field of the state of the session that is advancing."""

    def read(pipe: "LongLivePipeline") -> Any:
        return getattr(pipe._runs.current, name)

    def write(pipe: "LongLivePipeline", value: Any) -> None:
        setattr(pipe._runs.current, name, value)

    return property(read, write if writable else None)


def _on_own_grid(scheduler: Any) -> Any:
    """Return a scheduler or, in place of Wan's UniPC, whose grid is not the one that this model learned, one with the
    same shift on the model's own grid."""
    if type(scheduler) is not UniPCMultistepScheduler:
        return scheduler
    return LongLiveScheduler(flow_shift=scheduler.config["flow_shift"])


class LongLivePipeline(DiffusionPipeline, WanLoraLoaderMixin):
    r"""
    Real-time, multi-shot, endless video with LongLive-2.0 (arXiv 2605.18739).

    Args:
        tokenizer, text_encoder: UMT5, which encodes prompts; None where only embeddings are passed.
        vae: Wan2.2's VAE; None where only latents are wanted. One that is assigned later brings its scales along.
        transformer: The chunk-causal network; a `WanTransformer3DModel` is converted to one.
        scheduler: A [`LongLiveScheduler`]; Wan's UniPC is replaced by one with the same shift (with a warning, where
            it is assigned later), others stay as they are.
        window_size: The number of latent frames that the KV cache holds.
        sink_size: How many of the video's first latent frames it never forgets.
        multi_shot_sink: Whether the frames that opened the current shot are kept as well.
        multi_shot_rope_offset: The distance in time positions between two shots, on top of the frames between them;
            with `relative_rope`, there is none.
        scene_cut_prefix: Put before the prompt of the chunk that opens a shot, except for the first shot.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "vae"]  # embeddings in, latents out
    _callback_tensor_inputs = list(CALLBACK_TENSOR_INPUTS)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | None,
        vae: AutoencoderKLWan | None,
        transformer: LongLiveTransformer3DModel | WanTransformer3DModel,
        scheduler: SchedulerMixin,
        window_size: int = 32,
        sink_size: int = 8,
        multi_shot_sink: bool = True,
        multi_shot_rope_offset: float = 8.0,
        scene_cut_prefix: str = "The scene transitions. ",
    ):
        super().__init__()
        settings = {
            "window_size": window_size,
            "sink_size": sink_size,
            "multi_shot_sink": multi_shot_sink,
            "multi_shot_rope_offset": multi_shot_rope_offset,
            "scene_cut_prefix": scene_cut_prefix,
        }
        check_setting_types(settings, LongLivePipeline)
        # Third-party conversions have the layout of a Wan pipeline.
        if isinstance(transformer, WanTransformer3DModel):
            transformer = LongLiveTransformer3DModel.from_wan(transformer)
        scheduler = _on_own_grid(scheduler)
        self._set_scales(temporal=4, spatial=16)  # Wan2.2's, as long as there is no VAE
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(**settings)
        self._runs = RunView()
        self._workers = AsyncWorkers()

    def __setattr__(self, name: str, value: Any) -> None:
        """Like diffusers' own, except that a VAE brings its scales along, also where it is assigned later, and that
        Wan's UniPC is replaced then, too: loading would replace it, and the video would be another."""
        if name == "scheduler" and (own := _on_own_grid(value)) is not value:
            logger.warning(
                f"{type(value).__name__} is replaced by {type(own).__name__}(flow_shift={own.config['flow_shift']}): "
                "the model learned another grid of noise levels than Wan's."
            )
            value = own
        super().__setattr__(name, value)
        if name == "vae" and isinstance(vae := unwrap_module(value), AutoencoderKLWan):
            self._set_scales(vae.config["scale_factor_temporal"], vae.config["scale_factor_spatial"])

    def _set_scales(self, temporal: int, spatial: int) -> None:
        """Set how many frames, and how many pixels a side, latents stand for."""
        self.vae_scale_factor_temporal, self.vae_scale_factor_spatial = temporal, spatial
        self.video_processor = VideoProcessor(vae_scale_factor=spatial)

    # -- what callbacks read and change: the state of the session that calls them, see `run_state.py` -----------------

    guidance_scale = _run_property("guidance_scale")
    num_timesteps = _run_property("num_timesteps")
    current_timestep = _run_property("current_timestep")
    interrupt = _run_property("interrupt")
    attention_kwargs = _run_property("attention_kwargs")
    # diffusers' own callbacks write these.
    _guidance_scale = _run_property("guidance_scale", writable=True)
    _interrupt = _run_property("interrupt", writable=True)
    _attention_kwargs = _run_property("attention_kwargs", writable=True)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return is_guided(self.guidance_scale)

    @property
    def is_offloaded(self) -> bool:
        """Whether hooks move the models between devices while they run."""
        models = (self.text_encoder, self.transformer, self.vae)
        return any("_hf_hook" in model.__dict__ for model in models if model is not None)

    @property
    def _execution_device(self) -> torch.device:
        """The device the transformer runs on, and with it caches and latents. Where nothing is offloaded, diffusers
        would name the device of whatever component comes first, but every component may have one of its own."""
        models = (self.text_encoder, self.transformer, self.vae)
        offloaded = self.is_offloaded or any(_is_group_offload_enabled(model) for model in models if model is not None)
        return super()._execution_device if offloaded or self.transformer is None else self.transformer.device

    @property
    def vae_device(self) -> torch.device:
        """The device the VAE runs on: where the user moved it, or, if offloaded, where everything else runs."""
        return self._device_of(self.vae)

    def _device_of(self, model: AutoencoderKLWan | UMT5EncoderModel) -> torch.device:
        offloaded = self.is_offloaded or _is_group_offload_enabled(model)
        return self._execution_device if offloaded else model.device

    @property
    def sizes(self) -> ModelSizes:
        """The sizes of the networks, which a request has to fit."""
        return ModelSizes.of_configs(
            self.transformer.config, self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        )

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
        clean_pass: str = "full",
        attention_density: float = 1.0,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        decoder: TinyVideoDecoder | None = None,
    ) -> LongLivePipelineOutput | tuple:
        r"""
        Generate a video.

        Args:
            prompt: What the video shows; a list makes a batch.
            shot_prompts: In place of `prompt`: one prompt for each shot; a list of such lists makes a batch.
            chunks_per_shot: How long each shot lasts, in chunks: one number, one for each shot, or a list for each
                video. Without it, the video is divided evenly. Shots that find no room are left out, with a warning.
            image: The first frame of the video (image to video): a PIL image of any mode, an array `[H, W, 3]` or a
                tensor `[3, H, W]`; a list has one for each prompt. It is shown as a viewer shows it: upright, with
                what is transparent laid over white. If its shape is another one than the video's, it is resized to
                cover the video and cropped at the center. Integers are taken for 8 bits where none is above 255, else
                for fractions of their range. Floats are in [0, 1]; those in [-1, 1], which diffusers takes with a
                deprecation warning, are refused.
            video: A video to continue; the result begins with it: a list of frames, each like `image`, an array
                `[F, H, W, 3]` or a tensor `[F, 3, H, W]`; a list of these has one for each prompt. Frames that do not
                fill whole chunks are dropped from its beginning, with a warning.
            negative_prompt: What the video should not show; used where `guidance_scale` is neither 1 nor 0.
            height, width: The size of the video in pixels; the model's own by default.
            num_frames: The number of frames of the whole result; rounded up to whole chunks, with a warning.
            num_inference_steps: The solver steps of each chunk: 4 or 2 for distilled models, 30 to 50 for others; at
                most as many as the scheduler has timesteps (1000).
            guidance_scale: The scale of classifier-free guidance: 1 (or 0, both mean none) for distilled models, about
                3 for others.
            num_videos_per_prompt: How many videos are made for each prompt.
            generator: The random state of the initial noise; a list has one for each video.
            latents: The initial noise of all new frames, `[B, C, F, h, w]`; its F decides the length.
            image_latents, video_latents: Normalized latents `[B, C, 1, h, w]`, `[B, C, F0, h, w]` in place of `image`
                and `video`.
            prompt_embeds, negative_prompt_embeds: Embeddings `[B, L, D]` in place of prompts.
            window_size, sink_size, multi_shot_sink, multi_shot_rope_offset: Override the pipeline's own settings.
            relative_rope: Whether time positions are counted from the cached frames, as by default in a stream
                without an end; the distance between shots, `multi_shot_rope_offset`, is then left out.
            kv_cache_dtype: What keys and values are stored as: a dtype, "nvfp4", "fp8", or "fp8_attention", from which
                attention is computed in FP8; the transformer's dtype by default.
            clean_pass: What the history remembers a chunk by: "full", a forward on its clean latents; "text_free", the
                same without cross-attention, after which a prompt switch has no history to rewrite; or "last", the
                last solver step, without a further forward. A chunk that has no last step (of `video`, or interrupted)
                and one whose latents a callback changes after it have a full one. `benchmark/SPEED.md` has what each
                saves and costs.
            attention_density: The part of the history that chunks attend to, above 0 and at most 1: of the blocks of
                tokens that are neither their own, nor sinks, nor of the frames that opened the shot, those that matter
                most to each head (`models/sparse_attention.py`). 1 is everything, exactly.
            output_type: The layout of the result: "np" (floats in [0, 1]), "uint8" (an array like it, of bytes, made
                on the device: a quarter of the memory and of the copy to the host), "pt", "pil", or "latent"
                (normalized latents).
            return_dict: Whether to return a `LongLivePipelineOutput` instead of a tuple.
            attention_kwargs: `{"scale": s}` scales the LoRA; it may hold nothing else.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after every solver step, with
                steps counted over all chunks; may return changed tensors, of the shapes that they had. What it reads
                of `pipe` (`guidance_scale`, `num_timesteps`, ...) and writes to it (`_guidance_scale`, `_interrupt`,
                `_attention_kwargs`) is the state of this video alone.
            callback_on_step_end_tensor_inputs: The names of the tensors that the callback gets.
            max_sequence_length: The number of tokens that a prompt is padded or truncated to (a warning says where),
                at most the tokenizer's `model_max_length`. Where that is below 512, the default stands for it.
            decoder: A tiny decoder that makes the frames in place of the VAE, faster and less well, on the device and
                in the dtype that it was moved to; None for the VAE, which always encodes what the video begins with.

        Examples:

        Returns:
            [`LongLivePipelineOutput`], or `(frames,)`.

        Raises:
            ValueError: If anything is malformed or does not fit into memory; raised before any long work, with a
                message that states the numbers.
        """
        check_booleans(return_dict=return_dict)
        # These are only passed on; naming each of them again would make it easy to forget one.
        options = {name: value for name, value in locals().items() if name not in ("self", "return_dict")}
        if num_frames is None and latents is None:
            raise ValueError("`num_frames` None is an endless video: use `pipe.stream(...)`.")
        # With offloading, decoding each chunk as it comes would move the transformer in and out for each of them.
        decode_later = self.is_offloaded and output_type != "latent" and decoder is None
        if decode_later:
            check_output_type(output_type)
            options["output_type"] = "latent"

        def check() -> Request:
            request = self._resolve(async_decode=False, split_first_chunk=False, **options)
            self._check_vae(is_needed=decode_later)
            held_on = torch.device("cpu") if output_type in ("np", "uint8", "pil") else self._execution_device
            check_result_fits(request, self.sizes, output_type, held_on)
            return request

        with self._begin(check) as session:
            frames = join_frames([chunk.frames for chunk in session], options["output_type"])
        if isinstance(frames, torch.Tensor) and decode_later:
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
        clean_pass: str = "full",
        attention_density: float = 1.0,
        output_type: str = "np",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        decoder: TinyVideoDecoder | None = None,
        async_decode: bool = False,
        split_first_chunk: bool = False,
    ) -> StreamingSession:
        r"""
        Begin a video that is handed over chunk by chunk, as it is made. Arguments are those of `__call__`, except for:

        Args:
            num_frames: The number of frames of the whole result; None for an endless video.
            relative_rope: Whether time positions are counted from the cached frames; None: in endless videos only.
            async_decode: Whether the next chunk is denoised in a separate thread while this one is decoded (on a GPU,
                on a separate stream, or on the device that the VAE was moved to). The frames are the same; prompt
                switches take effect a chunk or two later. What PyTorch knows of the calling thread, such as
                `torch.autocast`, does not reach that thread.
            split_first_chunk: Whether the first chunk is handed over in parts, each a latent frame (one frame, then
                four at a time), so that the first frame does not wait until all of them are decoded. Not for
                `output_type="latent"`.

        Returns:
            A [`StreamingSession`]: iterate it, change its `prompt`, `cut()` to a new shot, and close it.
        """
        options = {name: value for name, value in locals().items() if name != "self"}

        return self._begin(lambda: self._resolve(**options))

    def _resolve(self, *, output_type, image, video, decoder, **options) -> Request:
        """Check everything that can be checked without work; the arguments are those of `stream`."""
        check_components(self.transformer, self.scheduler)
        uses_vae = (output_type != "latent" and decoder is None) or image is not None or video is not None
        self._check_vae(is_needed=uses_vae)
        request = resolve_request(
            self.sizes,
            self.config,
            is_offloaded=self.is_offloaded,
            output_type=output_type,
            image=image,
            video=video,
            decoder=decoder,
            **options,
        )
        copy.deepcopy(self.scheduler).set_timesteps(request.num_inference_steps)  # raises where it cannot solve
        if self.stream_ranks is not None:
            sends_pixels = uses_vae and self.stream_ranks.config.parallel_decode
            devices = {self._execution_device, *([self.vae_device] if sends_pixels else [])}
            self.stream_ranks.check_request(devices, is_guided=is_guided(request.guidance_scale))
        check_caches_fit(self.transformer, request, self._num_tokens(request), self._execution_device)
        return request

    def _begin(self, check: Callable[[], Request]) -> StreamingSession:
        """Check the request, encode what the video begins with, and return the session that does the rest. Ranks that
        share the stream begin it together."""
        agreement = Agreement(self.stream_ranks, self._execution_device)

        def check_here() -> Request:
            request = check()
            if request.async_decode:
                agreement.make_asynchronous()
            return request

        with agreement.beginning():
            request = agreement.unanimous(check_here, describe_request)
            try:
                return self._session(request, agreement)
            except BaseException:  # out of memory, for instance: no model stays where it was moved
                self.maybe_free_model_hooks()
                raise

    def _session(self, request: Request, agreement: Agreement) -> StreamingSession:
        # 1. Encode the prompts.
        prompts = self._encode_prompts(request, agreement)

        # 2. Encode the image, or the video to continue.
        image_latents = self._condition_latents(request.image, request.image_latents, agreement)
        video_latents = self._condition_latents(request.video, request.video_latents, agreement)

        # 3. Denoise and decode, chunk by chunk, as the session is iterated.
        device = self._execution_device
        denoiser = ChunkDenoiser(
            self.transformer,
            self.scheduler,
            request,
            prompts,
            image_latents=None if image_latents is None else image_latents.to(device, torch.float32),
            video_latents=video_latents,
            device=device,
            progress_bar=self.progress_bar if agreement.leads else partial(tqdm, disable=True),
            show_run=self._runs.showing,
            callback=None if request.callback is None else partial(request.callback, self),
            agreement=agreement,
        )
        decoder = None
        if request.output_type != "latent":
            decodes_on = self.vae_device if request.decoder is None else request.decoder.device
            shares_gpu = request.async_decode and device.type == "cuda" and decodes_on == device
            stream = self._workers.decode_stream(device) if shares_gpu else None
            decoder = self._chunk_decoder(request.output_type, request.decoder, stream)
        return StreamingSession(
            denoiser,
            decoder,
            is_single=request.is_single,
            agreement=agreement,
            worker=self._workers.denoise_worker(device) if request.async_decode else None,
            takes_turns=self.is_offloaded,
            splits_first_chunk=request.split_first_chunk,
            temporal_scale=self.vae_scale_factor_temporal,
            on_close=self.maybe_free_model_hooks,
        )

    def _condition_latents(
        self, pixels: torch.Tensor | None, latents: torch.Tensor | None, agreement: Agreement
    ) -> torch.Tensor | None:
        """Return the latents that the video begins with, encoded where they are not given; the first rank's."""
        host = torch.device("cpu")  # a long video need not fit on the device
        pixels, latents = (agreement.optional_tensor(lambda given=given: given, host) for given in (pixels, latents))
        return latents if pixels is None else self.encode_video(pixels)

    @property
    def stream_ranks(self) -> StreamRanks | None:
        """The ranks that share this pipeline's streams, after `pipe.transformer.enable_parallelism(...)`; else
        None."""
        if self.transformer is None or isinstance(self.transformer, WanTransformer3DModel):
            return None
        return self.transformer.stream_ranks

    @property
    def vae_group(self) -> ProcessGroup | None:
        """The ranks that the VAE's work is divided over; None where each does all of it."""
        ranks = self.stream_ranks
        if ranks is None or not ranks.config.parallel_decode or ranks.have_parted:
            return None
        return ranks.group("decode")

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Let an error end what the ranks share: the others wait for this one. (A ValueError is found by all.)"""
        try:
            yield
        except ValueError:
            raise
        except BaseException as error:
            Agreement(self.stream_ranks, self._execution_device).fail(error)

    # -- parts that are useful by themselves -------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Encode prompts to embeddings, zero beyond the end of each prompt; `__call__` takes them as `prompt_embeds`.

        Returns:
            The embeddings of the prompts and, with guidance, of the negative prompts, each
            `[B * num_videos_per_prompt, max_sequence_length, D]` (see `__call__`). Embeddings that are given are
            those of B prompts, with a length of their own; negative ones may be for all, `[1, L, D]`.

        Raises:
            ValueError: If there is neither a prompt nor `prompt_embeds`, prompts are no strings, embeddings are not
                `[B, L, D]`, there are not as many negative prompts as prompts, a number is less than 1 or, of tokens,
                beyond the tokenizer's limit, or the pipeline has no tokenizer or text encoder.
        """
        check_counts(num_videos_per_prompt=num_videos_per_prompt, max_sequence_length=max_sequence_length)
        check_booleans(do_classifier_free_guidance=do_classifier_free_guidance)
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None:
                check_embeds(name, embeds, None)
        if prompt_embeds is None:
            if prompt is None:
                raise ValueError("Pass `prompt` or `prompt_embeds`; both are None.")
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds = self._embed_prompts(prompts, max_sequence_length, device, dtype)
        batch = prompt_embeds.shape[0]
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt_embeds = self._embed_negative_prompts(
                negative_prompt, batch, max_sequence_length, device, dtype
            )
        prompt_embeds = prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = for_each_sample(
                "negative_prompt_embeds", negative_prompt_embeds, batch, num_videos_per_prompt
            )
        return prompt_embeds, negative_prompt_embeds

    @torch.no_grad()
    def encode_video(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels `[B, 3, 1 + 4 n, H, W]` in [-1, 1] to normalized latents `[B, C, 1 + n, h, w]`, float32. Ranks
        that share this pipeline's streams call it together, with the same pixels.

        Raises:
            ValueError: For pixels of another shape, number of frames or range; H and W are multiples of the VAE's
                `scale_factor_spatial`.
        """
        self._check_vae(is_needed=True)
        with self._together():
            return encode_video(self.vae, pixels, self.vae_device, group=self.vae_group)

    @torch.no_grad()
    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "np", decoder: TinyVideoDecoder | None = None
    ) -> Frames:
        """Decode normalized latents `[B, C, F, h, w]` of whole videos, in memory that does not depend on F, by the VAE
        or a tiny `decoder` (see `__call__`). Ranks that share this pipeline's streams call it together, with the same
        latents.

        Raises:
            ValueError: For latents of another shape, an unknown `output_type`, the output type "latent", or a decoder
                for other latents.
        """
        check_output_type(output_type)
        if output_type == "latent":
            raise ValueError('`output_type` "latent" leaves nothing to decode.')
        self._check_vae(is_needed=decoder is None)
        check_has_transformer(self.transformer, "latents are decoded in its chunks")
        check_decoder(decoder, self.sizes)
        check_latents("latents", latents, self.transformer.config.in_channels, chunk_size=1)
        chunk_decoder, chunk_size = self._chunk_decoder(output_type, decoder), self.transformer.config.chunk_size
        try:
            with self._together():
                frames = [chunk_decoder.decode(chunk) for chunk in latents.split(chunk_size, dim=2)]
        finally:
            self.maybe_free_model_hooks()
        return join_frames(frames, output_type)

    def _chunk_decoder(
        self, output_type: str, decoder: TinyVideoDecoder | None, stream: torch.cuda.Stream | None = None
    ) -> ChunkDecoder:
        if decoder is not None:
            return ChunkDecoder(decoder, self.video_processor, output_type, decoder.device, stream=stream)
        return ChunkDecoder(
            self.vae, self.video_processor, output_type, self.vae_device, stream=stream, group=self.vae_group
        )

    def _encode_prompts(self, request: Request, agreement: Agreement) -> PromptSource:
        """Encode the prompts that are planned, and return a source that also encodes those that come later. Only the
        first of the ranks that share the stream encodes."""
        prompt_embeds, negative_embeds = agreement.optional_tensor(lambda: request.prompt_embeds), None
        if prompt_embeds is not None:
            prompt_embeds = self._for_transformer(request.for_each_sample("prompt_embeds", prompt_embeds))
        if is_guided(request.guidance_scale):
            negative_embeds = agreement.tensor(lambda: self._negative_embeds(request))
        plans = agreement.order(request.plans)
        if plans is not None:
            plans = [plan for plan in plans for _ in range(request.num_videos_per_prompt)]
        return PromptSource(
            plans,
            lambda prompts: agreement.tensor(lambda: self._embed_prompts(prompts, request.max_sequence_length)),
            prompt_embeds=prompt_embeds,
            negative_embeds=negative_embeds,
            batch_size=request.batch_size,
            scene_cut_prefix=self.config["scene_cut_prefix"],
            num_new_chunks=request.num_new_chunks,
            check_can_encode=self._check_can_encode if agreement.leads else None,
            continues=request.num_condition_chunks > 0,
        )

    def _negative_embeds(self, request: Request) -> torch.Tensor:
        embeds = request.negative_prompt_embeds
        if embeds is None:
            embeds = self._embed_negative_prompts(
                request.negative_prompt, request.num_prompts, request.max_sequence_length
            )
        return self._for_transformer(request.for_each_sample("negative_prompt_embeds", embeds))

    def _for_transformer(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds.to(self._execution_device, self.transformer.dtype)

    def _num_tokens(self, request: Request) -> int:
        """The number of tokens of a prompt's embeddings."""
        if request.prompt_embeds is not None:
            return request.prompt_embeds.shape[1]
        return self._text_length(request.max_sequence_length)

    def _text_length(self, max_sequence_length: int) -> int:
        """Return the number of tokens that prompts are padded or cut to."""
        if self.tokenizer is None:
            return max_sequence_length
        limit = self.tokenizer.model_max_length  # transformers' 10**30 where there is none
        if max_sequence_length > limit and max_sequence_length != DEFAULT_MAX_SEQUENCE_LENGTH:
            raise ValueError(
                f"`max_sequence_length` must be at most {limit}, the tokenizer's limit, got {max_sequence_length}."
            )
        return min(max_sequence_length, limit)

    def _check_vae(self, *, is_needed: bool) -> None:
        vae = unwrap_module(self.vae)
        if is_needed and not isinstance(vae, AutoencoderKLWan):
            raise ValueError(
                f"Pixels need an AutoencoderKLWan, this pipeline's VAE is {type(vae).__name__}: pass latents, "
                'and `output_type="latent"`.'
            )
        if is_needed and vae is not self.vae:
            raise ValueError(
                "The VAE is what `torch.compile` returned, which is never called as a whole: keep it as it was, and "
                "call `pipe.vae.decoder.compile()`."
            )
        if self.transformer is None or not isinstance(vae, AutoencoderKLWan):
            return
        channels = self.transformer.config.in_channels
        if vae.config["z_dim"] != channels:
            raise ValueError(f"The transformer's latents have {channels} channels, the VAE's {vae.config['z_dim']}.")

    def _check_can_encode(self, num_prompts: int) -> None:
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                f"{counted(num_prompts, 'prompt')}, but no tokenizer or text encoder: pass `prompt_embeds`."
            )

    def _embed_prompts(
        self,
        prompts: list[str],
        max_sequence_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Encode n prompts to `[n, max_sequence_length, D]` (see `__call__`); by default, on the device and in the
        dtype of the transformer."""
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"Prompts are a string or a list of at least one string, got {prompts!r}.")
        self._check_can_encode(len(prompts))
        device = device or self._execution_device
        dtype = dtype or (self.text_encoder.dtype if self.transformer is None else self.transformer.dtype)
        prompts = [clean_prompt(prompt) for prompt in prompts]
        max_length = self._text_length(max_sequence_length)
        for cut in describe_cuts(prompts, self.tokenizer, max_length):
            logger.warning(cut)
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=max_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        encoder_device = self._device_of(self.text_encoder)
        mask = tokens.attention_mask.to(encoder_device)
        embeds = self.text_encoder(tokens.input_ids.to(encoder_device), mask).last_hidden_state
        return (embeds * mask.to(embeds.dtype)[..., None]).to(device, dtype)

    def _embed_negative_prompts(
        self, negative_prompt: str | list[str] | None, batch: int, max_sequence_length: int, device=None, dtype=None
    ) -> torch.Tensor:
        """Encode negative prompts: one for all, one for each prompt, or (None) the empty prompt."""
        prompts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * batch
        if len(prompts) != batch:
            raise ValueError(f"`negative_prompt` has {counted(len(prompts), 'prompt')} for a batch of {batch}.")
        return self._embed_prompts(prompts, max_sequence_length, device, dtype)

    # -- speed -------------------------------------------------------------------------------------------------------

    def optimize(self, speed: str = "exact") -> SpeedPlan:
        """
        Change the models in place, for inference, to what is fastest on their device; it cannot be undone, but for
        loading them again. Call it last: after `.to(device)`, after LoRAs are loaded or fused, after quantizing and
        compiling. What is written to weights afterwards, other than by `load_state_dict`, may have no effect.

        Args:
            speed: "exact": the same video, to within rounding. "fast": fewer bits, where the device is faster in them:
                linear layers in FP8 on Hopper, Ada and Blackwell; bfloat16 on a CPU that has instructions for it.
                "fastest": also less work, by `arguments` of the returned plan.

        Returns:
            What was chosen, and what it costs: `print` it. Pass its `arguments` on, `pipe(prompt, **plan.arguments)`.

        Raises:
            ValueError: For an unknown speed; without a transformer; for another speed than "exact", if there is a LoRA
                that was not fused and unloaded.
        """
        check_has_transformer(self.transformer, "it is what is optimized")
        return optimize(self.transformer, self.vae, speed, self._execution_device)

    # -- sharing -----------------------------------------------------------------------------------------------------

    def model_card(self, repo_id: str, **details) -> ModelCard:
        """Render a model card: what this pipeline is, which package loads it, and an example in its own size.

        Args:
            repo_id: The repository that it is for, `user/name`.
            **details: Arguments of `pipelines.sharing.render_model_card`, for instance `base_model` or `license`.

        Raises:
            ValueError: If the pipeline has no transformer.
        """
        check_has_transformer(self.transformer, "the card describes it")
        scale, config = self.vae_scale_factor_spatial, self.transformer.config
        sizes = {"height": config.sample_height * scale, "width": config.sample_width * scale}
        stored = {"quantization": "NVFP4 (4 bits)", "tags": ["nvfp4"]} if nvfp4_layers(self.transformer) else {}
        return render_model_card(repo_id, chunk_size=config.chunk_size, **{**sizes, **stored, **details})

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Like diffusers' own `save_pretrained`, except that nothing written names a folder of this machine, and that
        a folder without a README.md gets one, which says which package loads the pipeline.

        Raises:
            ValueError: If layers are in FP8, by [`optimize`], of which there is no file format, have a LoRA, or fused
                projections.
        """
        if self.transformer is not None:
            check_can_be_saved(self.transformer)
        super().save_pretrained(save_directory, *args, **kwargs)
        strip_local_paths(save_directory, self.components)
        readme = Path(save_directory) / "README.md"
        if not readme.exists() and self.transformer is not None:
            folder = os.path.abspath(save_directory)  # "." has no name of its own
            self.model_card(Path(folder).name or "pipeline").save(readme)

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, token: str | None = None, **kwargs):
        """Upload to the Hub with a model card and without local paths.

        `push_to_hub` and `save_pretrained(push_to_hub=True)` both come through here, with diffusers' placeholder of a
        card. A card that is already on the Hub belongs to its owner, and is kept.
        """
        if self.transformer is not None and load_model_card(repo_id, token=token) is None:
            self.model_card(repo_id).save(Path(working_dir) / "README.md")
        strip_local_paths(working_dir, self.components)
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    @classmethod
    def from_single_file(cls, *args, **kwargs) -> "LongLivePipeline":
        """
        Refuse diffusers' way to make a whole pipeline from one weight file, which holds the transformer alone.

        Raises:
            ValueError: Always; the message says what to do instead.
        """
        raise ValueError(
            "A single file holds the transformer alone. Make a pipeline folder of it with `longlive convert FILE "
            "--base PIPELINE --output FOLDER`, or load it into a pipeline: LongLivePipeline.from_pretrained(PIPELINE, "
            "transformer=LongLiveTransformer3DModel.from_single_file(FILE))."
        )

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, Any], **kwargs
    ) -> Any:
        """Like diffusers' own `lora_state_dict`, except that LongLive's LoRA files (`lora.pt`) and PEFT's are read as
        well: directly, or from a folder or a repository on the Hub, with the alpha that is stored with them.

        Raises:
            ValueError: If the LoRA cannot be found or read, or is incomplete.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping):
            lora = LoraFile("The given dictionary", source)
        else:
            names = (
                "cache_dir",
                "force_download",
                "local_files_only",
                "token",
                "revision",
                "weight_name",
                "subfolder",
            )
            lora = read_lora_file(find_lora_file(source, **{name: kwargs[name] for name in names if name in kwargs}))
        state_dict, metadata = read_lora(lora, super().lora_state_dict)
        return (state_dict, metadata) if kwargs.get("return_lora_metadata", False) else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, Any],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ) -> None:
        """Like diffusers' own `load_lora_weights`, which leaves layers that it does not know, or of which a half is
        missing, to chance.

        Raises:
            ValueError: If the LoRA cannot be found or read, or does not fit the transformer, or there is none, or it
                was optimized, see [`optimize`], its projections fused, or its layers stored in 8 bits.
        """
        check_booleans(hotswap=hotswap)
        check_has_transformer(self.transformer, "the LoRA is put onto it")
        transformer = unwrap_module(self.transformer)  # a compiled one has other names
        check_takes_lora(transformer, is_there=hotswap)
        kwargs["return_lora_metadata"] = True
        state_dict, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        check_lora_fits(state_dict, weights_of(transformer))
        self.load_lora_into_transformer(
            state_dict,
            transformer=transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=kwargs.get("low_cpu_mem_usage", True),
            hotswap=hotswap,
        )

    def unfuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs) -> None:
        """Like diffusers' own `unfuse_lora`, which takes LoRAs out of the layers of a network by itself: a forward in
        another thread is waited for."""
        with nullcontext() if self.transformer is None else self.transformer.lora_turns:
            super().unfuse_lora(list(components), **kwargs)
