"""StreamingSession: one video (or batch of videos) being made, chunk by chunk.

The session holds all that changes while a video is made - KV caches, decoder, solver, random state, prompts - so that a
pipeline can serve any number of sessions, advanced in any order. For each chunk (LongLive-2.0, streaming inference):

1. the chunk's slice of the initial noise;
2. a few solver steps, each network call writing the chunk's keys and values into the cache and attending over it;
3. one more call on the finished chunk at timestep 0, so that the cache remembers it clean;
4. decode.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

from ..models.kv_cache import KVCache
from ..models.streaming_vae import StreamingDecoder
from .pipeline_output import Frames, VideoChunk
from .prefetch import Prefetcher
from .prompt_source import PromptSource


if TYPE_CHECKING:
    from .pipeline_longlive import LongLivePipeline


@dataclass
class RunState:
    """What a callback may read and change while a session runs; `pipe.guidance_scale` and its like show it."""

    guidance_scale: float
    num_timesteps: int
    attention_kwargs: dict[str, Any] | None
    current_timestep: torch.Tensor | None = None
    interrupt: bool = False


@dataclass(frozen=True)
class StreamSettings:
    """What does not change while a session runs. Sizes are counted in latent frames.

    `latent_shape` is that of one chunk, `[rows, C, chunk_size, h, w]`; `num_chunks` counts the whole result, None for an
    endless one.
    """

    latent_shape: tuple[int, int, int, int, int]
    num_chunks: int | None
    num_inference_steps: int
    window_size: int
    sink_size: int
    multi_shot_sink: bool
    multi_shot_rope_offset: float
    relative_rope: bool
    kv_cache_dtype: torch.dtype | None
    output_type: str
    is_single: bool
    callback: Callable | PipelineCallback | MultiPipelineCallbacks | None
    callback_inputs: tuple[str, ...]
    async_decode: bool


@dataclass(frozen=True)
class _DenoisedChunk:
    """A finished chunk on its way to the decoder; `ready` marks, on a GPU, when its latents are."""

    latents: torch.Tensor
    index: int
    shot_index: int | list[int]
    prompt: str | None | list[str | None]
    ready: torch.cuda.Event | None


class StreamingSession:
    """
    Iterating yields [`VideoChunk`]s. Made by [`LongLivePipeline.stream`]; close it, or use it as a context manager, to
    free its caches.

    `session.prompt = "..."` changes the prompt from the next chunk on, and rewrites the cached history under it;
    `session.cut("...")` begins a new shot with the next chunk. Either replaces what was planned after it. With
    asynchronous decoding, denoising is ahead of what has been yielded, and the *next chunk* is the next to be denoised.
    """

    def __init__(
        self,
        pipeline: "LongLivePipeline",
        settings: StreamSettings,
        prompts: PromptSource,
        *,
        guidance_scale: float,
        attention_kwargs: dict[str, Any] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: torch.Tensor | None,
        image_latents: torch.Tensor | None,
        video_latents: torch.Tensor | None,
    ):
        self.pipeline, self.settings, self.prompts = pipeline, settings, prompts
        self.device = pipeline._execution_device
        self.num_condition_chunks = 0
        if video_latents is not None:
            self.num_condition_chunks = video_latents.shape[2] // settings.latent_shape[2]
        num_new_chunks = (settings.num_chunks or 0) - self.num_condition_chunks
        self.run = RunState(guidance_scale, max(num_new_chunks, 0) * settings.num_inference_steps, attention_kwargs)
        self._guided = guidance_scale != 1
        self._generator = _private_generator() if generator is None else generator
        self._noise, self._image_latents, self._video_latents = noise, image_latents, video_latents
        self._scheduler = copy.deepcopy(pipeline.scheduler)
        self._caches: list[KVCache] = []  # for the prompt and, with guidance, for the negative prompt
        self._clean_latents: dict[int, torch.Tensor] = {}  # by chunk, for as long as one of its frames is cached
        self._decoder = StreamingDecoder(pipeline.vae) if settings.output_type != "latent" else None
        on_one_gpu = self.device.type == "cuda" and pipeline.vae.device == self.device
        self._decode_stream = torch.cuda.Stream(self.device) if settings.async_decode and on_one_gpu else None
        self._closed = False
        self._source: Iterator[_DenoisedChunk] = self._denoise_chunks()
        if settings.async_decode:
            self._source = Prefetcher(self._source)

    def __iter__(self) -> "StreamingSession":
        return self

    def __next__(self) -> VideoChunk:
        if self._closed:
            raise StopIteration
        try:
            chunk = next(self._source)
            frames = self._decode(chunk)
        except BaseException:  # the end of the stream included: nothing is left half-open
            self.close()
            raise
        scale, size = self.pipeline.vae_scale_factor_temporal, self.settings.latent_shape[2]
        start_frame = max(0, 1 + scale * (chunk.index * size - 1))  # the video's first latent frame is a single frame
        return VideoChunk(frames, chunk.latents, chunk.index, chunk.shot_index, chunk.prompt, start_frame)

    @property
    def prompt(self) -> str | None | list[str | None]:
        """The prompt of the next chunk; setting it switches, with recache. A list where a batch is streamed."""
        return self._one_or_all(self.prompts.upcoming())

    @prompt.setter
    def prompt(self, prompt: str | list[str]) -> None:
        self._check_open()
        self.prompts.redirect(prompt, cut=False)

    def cut(self, prompt: str | list[str]) -> None:
        """Begin a new shot with the next chunk."""
        self._check_open()
        self.prompts.redirect(prompt, cut=True)

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the KV caches."""
        return sum(cache.num_bytes for cache in self._caches)

    def close(self) -> None:
        """Stop, and free the caches. Further iteration ends at once."""
        if self._closed:
            return
        self._closed = True
        self._source.close()
        self._caches, self._clean_latents, self._decoder = [], {}, None
        self._noise = self._image_latents = self._video_latents = None
        self.pipeline.maybe_free_model_hooks()

    def __enter__(self) -> "StreamingSession":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    # -- denoising ---------------------------------------------------------------------------------------------------

    def _denoise_chunks(self) -> Iterator[_DenoisedChunk]:
        total = self.settings.num_chunks
        bar = self.pipeline.progress_bar(itertools.count() if total is None else range(total))
        bar.set_description("Chunks")
        self._allocate_caches()
        with bar:
            for index in itertools.count() if total is None else range(total):
                if self.run.interrupt:
                    return
                yield self._make_chunk(index)
                bar.update()

    @torch.no_grad()
    def _make_chunk(self, index: int) -> _DenoisedChunk:
        self.pipeline._run = self.run
        prompts, text, switched = self.prompts.advance(index - self.num_condition_chunks)
        if switched:
            self._recache(text)
        self._begin_chunk(prompts)
        if index < self.num_condition_chunks:
            size = self.settings.latent_shape[2]
            latents = self._video_latents[:, :, index * size : (index + 1) * size].to(self.device, torch.float32)
        else:
            latents, text = self._solve(index, text)
        self._write_clean(latents, text)
        self._remember(index, latents)
        ready = None
        if self._decode_stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        shots = [prompt.shot_index for prompt in prompts]
        return _DenoisedChunk(
            latents, index, self._one_or_all(shots), self._one_or_all([prompt.prompt for prompt in prompts]), ready
        )

    def _solve(self, index: int, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From noise to the chunk's clean latents; also the text, which a callback may have changed."""
        new_index = index - self.num_condition_chunks
        latents = self._initial_noise(new_index)
        first_frame = self._image_latents if index == 0 else None
        self._scheduler.set_timesteps(self.settings.num_inference_steps, device=self.device)
        step_bar = self.pipeline.progress_bar(total=len(self._scheduler.timesteps))
        step_bar.set_description(f"Chunk {index} steps")
        step_bar.leave = False
        with step_bar:
            for step, timestep in enumerate(self._scheduler.timesteps):
                if self.run.interrupt:
                    break
                self.run.current_timestep = timestep
                latents = _with_first_frame(latents, first_frame)
                velocity = self._predict(latents, timestep, text, first_frame is not None)
                latents = self._scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                latents = _with_first_frame(latents, first_frame)
                if self.settings.callback is not None:
                    global_step = new_index * self.settings.num_inference_steps + step
                    latents, text = self._call_back(global_step, timestep, latents, text)
                step_bar.update()
        self.run.current_timestep = None
        return latents, text

    def _predict(self, latents, timestep: torch.Tensor, text: torch.Tensor, keeps_first_frame: bool) -> torch.Tensor:
        """The velocity, guided where there is a negative prompt: `v_neg + s (v_pos - v_neg)`."""
        per_frame = timestep.to(self.device).expand(latents.shape[0], latents.shape[2]).clone()
        if keeps_first_frame:
            per_frame[:, 0] = 0
        velocity = self._forward(latents, per_frame, text, self._caches[0])
        if self._guided:
            negative = self._forward(latents, per_frame, self.prompts.negative, self._caches[1])
            velocity = negative + self.run.guidance_scale * (velocity - negative)
        return velocity

    def _forward(self, latents, timestep: torch.Tensor, text: torch.Tensor, cache: KVCache) -> torch.Tensor:
        transformer = self.pipeline.transformer
        return transformer(
            latents.to(transformer.dtype),
            timestep,
            text,
            kv_cache=cache,
            attention_kwargs=self.run.attention_kwargs,
            return_dict=False,
        )[0].float()

    def _write_clean(self, latents: torch.Tensor, text: torch.Tensor) -> None:
        """One forward at timestep 0: from now on the cache holds the chunk as it is, not as it was on its way."""
        clean = torch.zeros(latents.shape[0], device=self.device)
        for cache, embeds in zip(self._caches, (text, self.prompts.negative), strict=False):
            self._forward(latents, clean, embeds, cache)

    def _recache(self, text: torch.Tensor) -> None:
        """Rewrite history under a new prompt (LongLive 1.0, KV recache), so that it no longer carries the old one."""
        cache, size = self._caches[0], self.settings.latent_shape[2]
        for frames in cache.recache():
            rows = [
                torch.stack([self._clean_latents[i // size][row, :, i % size] for i in indices], dim=1)
                for row, indices in enumerate(frames)
            ]
            latents = torch.stack(rows)  # [B, C, n, h, w]
            self._forward(latents, torch.zeros(len(rows), device=self.device), text, cache)

    def _remember(self, index: int, latents: torch.Tensor) -> None:
        self._clean_latents[index] = latents
        size, cache = self.settings.latent_shape[2], self._caches[0]
        cached = {frame.index // size for row in range(cache.batch_size) for frame in cache.cached_frames(row)}
        self._clean_latents = {chunk: self._clean_latents[chunk] for chunk in cached}

    def _begin_chunk(self, prompts: list) -> None:
        for cache in self._caches:
            cache.begin_chunk(
                self.settings.latent_shape[2],
                opens_shot=[prompt.cuts for prompt in prompts],
                rope_offset=[prompt.shot_index * self.settings.multi_shot_rope_offset for prompt in prompts],
            )

    def _allocate_caches(self) -> None:
        rows, _, _, height, width = self.settings.latent_shape
        self._caches = [
            self.pipeline.transformer.create_kv_cache(
                rows,
                height,
                width,
                window_size=self.settings.window_size,
                sink_size=self.settings.sink_size,
                multi_shot_sink=self.settings.multi_shot_sink,
                relative_rope=self.settings.relative_rope,
                dtype=self.settings.kv_cache_dtype,
                device=self.device,
            )
            for _ in range(2 if self._guided else 1)
        ]

    def _initial_noise(self, new_index: int) -> torch.Tensor:
        """The chunk's own noise. Drawn chunk by chunk, so that a longer video begins like a shorter one."""
        shape = self.settings.latent_shape
        if self._noise is None:
            return randn_tensor(shape, generator=self._generator, device=self.device, dtype=torch.float32)
        start = new_index * shape[2]
        return self._noise[:, :, start : start + shape[2]].to(self.device, torch.float32)

    def _call_back(self, step: int, timestep, latents, text) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = {"latents": latents, "prompt_embeds": text, "negative_prompt_embeds": self.prompts.negative}
        wanted = {name: tensors[name] for name in self.settings.callback_inputs}
        changed = self.settings.callback(self.pipeline, step, timestep, wanted) or {}
        if changed.get("prompt_embeds", text) is not text:
            text = changed["prompt_embeds"]
            self.prompts.replace_text(text)
        if "negative_prompt_embeds" in changed:
            self.prompts.negative = changed["negative_prompt_embeds"]
        return changed.get("latents", latents), text

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _decode(self, chunk: _DenoisedChunk) -> Frames:
        """The chunk's frames, in the output layout."""
        if self._decoder is None:
            return chunk.latents
        stream = self._decode_stream
        if stream is not None:
            stream.wait_event(chunk.ready)
            chunk.latents.record_stream(stream)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            frames = self.pipeline.decode_chunk(self._decoder, chunk.latents, self.settings.output_type)
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        return frames

    def _one_or_all(self, values: list):
        """A single video's value by itself, a batch's as a list."""
        return values[0] if self.settings.is_single else values

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("This session is closed.")


def _private_generator() -> torch.Generator:
    """Seeded from the global random state, once: what else draws from it meanwhile does not matter."""
    seed = int(torch.randint(2**63 - 1, ()))
    return torch.Generator().manual_seed(seed)


def _with_first_frame(latents: torch.Tensor, first_frame: torch.Tensor | None) -> torch.Tensor:
    """Image to video: the chunk with its first frame replaced by the given one."""
    return latents if first_frame is None else torch.cat([first_frame, latents[:, :, 1:]], dim=2)
