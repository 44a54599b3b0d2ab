"""ChunkDenoiser: from noise to clean latents, chunk by chunk.

For each chunk (LongLive-2.0, streaming inference):

1. the chunk's slice of the initial noise;
2. a few solver steps, each network call writing the chunk's keys and values into the cache and attending over it;
3. one more call on the finished chunk at timestep 0, so that the cache remembers it clean.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

from ..models.kv_cache import KVCache
from .prompt_source import PromptSource
from .shots import ChunkPrompt


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
class DenoiseSettings:
    """What does not change while a session runs. Sizes are counted in latent frames.

    `latent_shape` is that of one chunk, `[rows, C, chunk_size, h, w]`; `num_chunks` counts the whole result, None for
    an endless one.
    """

    latent_shape: tuple[int, int, int, int, int]
    num_chunks: int | None
    num_inference_steps: int
    window_size: int
    sink_size: int
    multi_shot_sink: bool
    multi_shot_rope_offset: float
    relative_rope: bool
    kv_cache_dtype: torch.dtype | str | None
    callback: Callable | PipelineCallback | MultiPipelineCallbacks | None
    callback_inputs: tuple[str, ...]


@dataclass(frozen=True)
class DenoisedChunk:
    """A finished chunk: normalised latents `[rows, C, chunk_size, h, w]`, its number, and each row's prompt. `ready`
    marks, on a GPU, when the latents are there."""

    latents: torch.Tensor
    index: int
    prompts: list[ChunkPrompt]
    ready: torch.cuda.Event | None


class ChunkDenoiser:
    """
    Makes the latents of one batch of videos; iterate [`chunks`]. Holds all state of denoising - KV caches, solver,
    random state - and knows nothing of who consumes the chunks, or in which thread.

    Args:
        pipeline: Whose networks are used; not changed.
        settings: See [`DenoiseSettings`].
        prompts: Text embeddings of every chunk.
        guidance_scale, attention_kwargs: To begin with; callbacks may change them.
        generator: Random state, or one for each row; None: seeded from the global one.
        noise: Initial noise of all new frames, or None.
        image_latents, video_latents: Normalised conditions, or None.
    """

    def __init__(
        self,
        pipeline: "LongLivePipeline",
        settings: DenoiseSettings,
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
        self.caches: list[KVCache] = []  # for the prompt and, with guidance, for the negative prompt
        self._guided = is_guided(guidance_scale)
        self._generator = _private_generator() if generator is None else generator
        self._noise, self._image_latents, self._video_latents = noise, image_latents, video_latents
        self._scheduler = copy.deepcopy(pipeline.scheduler)
        self._clean_latents: dict[int, torch.Tensor] = {}  # by chunk, for as long as one of its frames is cached

    def chunks(self) -> Iterator[DenoisedChunk]:
        """The chunks in order; those of a video that is continued come first."""
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
    def _make_chunk(self, index: int) -> DenoisedChunk:
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
        self._write_clean(latents, text, self.caches)
        self._remember(index, latents)
        ready = None
        if latents.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        return DenoisedChunk(latents, index, prompts, ready)

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
        per_frame = timestep.to(self.device, torch.float32).expand(latents.shape[0], latents.shape[2]).clone()
        if keeps_first_frame:
            per_frame[:, 0] = 0
        velocity = self._forward(latents, per_frame, text, self.caches[0])
        if self._guided and is_guided(self.run.guidance_scale):  # a callback may have switched it off
            negative = self._forward(latents, per_frame, self.prompts.negative, self.caches[1])
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

    def _write_clean(self, latents: torch.Tensor, text: torch.Tensor, caches: list[KVCache]) -> None:
        """A forward at timestep 0: from now on the caches hold the chunk as it is, not as it was on its way."""
        # A time for each frame, like a step's, so that both are one graph when compiled.
        clean = torch.zeros(latents.shape[0], latents.shape[2], device=self.device)
        texts = (text, self.prompts.negative)
        for cache, embeds in zip(caches, texts, strict=False):
            cache.finish_chunk()
            self._forward(latents, clean, embeds, cache)

    def _recache(self, text: torch.Tensor) -> None:
        """Rewrite history under a new prompt (LongLive 1.0, KV recache), so that it no longer carries the old one."""
        cache, size = self.caches[0], self.settings.latent_shape[2]
        for frames in cache.recache():
            rows = [
                torch.stack([self._clean_latents[i // size][row, :, i % size] for i in indices], dim=1)
                for row, indices in enumerate(frames)
            ]
            self._write_clean(torch.stack(rows), text, [cache])  # [B, C, n, h, w]

    def _remember(self, index: int, latents: torch.Tensor) -> None:
        self._clean_latents[index] = latents
        size, cache = self.settings.latent_shape[2], self.caches[0]
        cached = {frame.index // size for row in range(cache.batch_size) for frame in cache.cached_frames(row)}
        self._clean_latents = {chunk: self._clean_latents[chunk] for chunk in cached}

    def _begin_chunk(self, prompts: list[ChunkPrompt]) -> None:
        for cache in self.caches:
            cache.begin_chunk(
                self.settings.latent_shape[2],
                opens_shot=[prompt.cuts for prompt in prompts],
                rope_offset=[prompt.shot_index * self.settings.multi_shot_rope_offset for prompt in prompts],
            )

    def _allocate_caches(self) -> None:
        rows, _, _, height, width = self.settings.latent_shape
        self.caches = [
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
        return self._noise[:, :, start : start + shape[2]].to(self.device, torch.float32).contiguous()

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


def is_guided(guidance_scale: float) -> bool:
    """Whether there is classifier-free guidance: 1 is none, and so, by diffusers' custom, is 0."""
    return guidance_scale not in (0, 1)


def _private_generator() -> torch.Generator:
    """Seeded from the global random state, once: what else draws from it meanwhile does not matter."""
    seed = int(torch.randint(2**63 - 1, ()))
    return torch.Generator().manual_seed(seed)


def _with_first_frame(latents: torch.Tensor, first_frame: torch.Tensor | None) -> torch.Tensor:
    """Image to video: the chunk with its first frame replaced by the given one."""
    return latents if first_frame is None else torch.cat([first_frame, latents[:, :, 1:]], dim=2)
