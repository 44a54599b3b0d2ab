"""ChunkDenoiser: makes the latents of a video, chunk by chunk, under prompts that may change meanwhile.

It owns what one stream needs - KV caches, solver, random state, clean latents for recaching - and makes each chunk
with the plain functions of `chunk_step.py`: it hands over the latents of a chunk as soon as they are solved, so that
they can be decoded, and writes the chunk into the cache afterwards.
"""

import copy
import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..host_copies import to_device
from ..limits import MAX_GUIDANCE_SCALE
from ..models.attention_kwargs import check_attention_kwargs
from ..models.kv_cache import KVCache, version_of
from ..models.lora_scales import lora_scales
from ..models.text_fingerprint import text_fingerprint
from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..number_checks import check_counts, check_non_negative
from ..parallel.agreement import ALONE, Agreement
from .callbacks import check_returned
from .chunk_step import Conditioning, Solver, finish, is_guided, rewrite_history, solve
from .inputs import Request
from .memory import cache_bytes
from .prompt_source import PromptSource, Redirection
from .run_state import RunState
from .shots import ChunkPrompt
from .stopwatch import Stopwatch


Callback = Callable[[int, torch.Tensor, dict[str, torch.Tensor | None]], dict[str, torch.Tensor] | None]
"""A user's callback, bound to its pipeline: takes step, timestep and tensors by name, returns changed tensors."""


@dataclass(frozen=True)
class DenoisedChunk:
    """A chunk's normalized latents `[B, C, chunk_size, h, w]`, its index, each sample's prompt, and how long it took.
    Where it was made on another stream than the consumer's, `ready` marks when the latents are ready."""

    latents: torch.Tensor
    index: int
    prompts: list[ChunkPrompt]
    stopwatch: Stopwatch | None = None
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True)
class ChunkOrders:
    """What a chunk is made with, as the first of the ranks that share the stream decides; None in its place ends the
    stream."""

    redirection: Redirection | None
    num_inference_steps: int
    guidance_scale: float
    attention_kwargs: dict[str, Any] | None
    loras: tuple  # which the others have to have as well


class ChunkDenoiser:
    """
    Makes the latents of one batch of videos: iterate over [`chunks`]. It holds all state of denoising, and does not
    depend on who consumes the chunks, or in which thread.

    Args:
        transformer: The network; not changed.
        scheduler: The solver; copied.
        request: The checked request.
        prompts: The source of the prompts and prompt embeddings of every chunk.
        image_latents, video_latents: The normalized latents that the video begins with, or None.
        device: The device that the transformer runs on.
        progress_bar: Creates progress bars, like `DiffusionPipeline.progress_bar`.
        show_run: Opened with the run's state for each chunk, so that the pipeline shows the session that is advancing.
        callback: Called after every solver step, or None.
        agreement: What the ranks that share the stream agree by.
    """

    def __init__(
        self,
        transformer: LongLiveTransformer3DModel,
        scheduler: Solver,
        request: Request,
        prompts: PromptSource,
        *,
        image_latents: torch.Tensor | None,
        video_latents: torch.Tensor | None,
        device: torch.device,
        progress_bar: Callable[..., Any],
        show_run: Callable[[RunState], AbstractContextManager[None]],
        callback: Callback | None,
        agreement: Agreement = ALONE,
    ):
        self.transformer, self.scheduler, self.request = transformer, scheduler, request
        self.prompts, self.device = prompts, device
        self.num_inference_steps = request.num_inference_steps  # of the next chunk
        self._num_steps = 0  # of all chunks that were begun
        num_timesteps = (request.num_new_chunks or 0) * request.num_inference_steps
        self.run = RunState(request.guidance_scale, num_timesteps, request.attention_kwargs)
        # For the prompt and, with guidance, for the negative prompt; None where another rank has it.
        self.kv_caches: list[KVCache | None] = []
        self._scheduler = copy.deepcopy(scheduler)
        self._generator = _private_generator() if request.generator is None else request.generator
        self._image_latents, self._video_latents = image_latents, video_latents
        self._progress_bar, self._show_run, self._callback = progress_bar, show_run, callback
        self._clean_latents: dict[int, torch.Tensor] = {}  # by chunk, for as long as one of its frames is cached
        self._clean_pass: Callable[[], None] | None = None  # of the chunk that was yielded last, if it is still to run
        self._text_made_with: tuple | None = None  # what the cached keys and values of the text were computed with
        self._thread: int | None = None  # the one that makes a chunk
        self._agreement, self._is_ended = agreement, False  # whether the others know of the end
        self.failure: BaseException | None = None  # what has ended the stream that ranks share
        self._ends_early = False  # the chunk in progress after its current step, as the first rank decides
        self._calls_back = agreement.order(callback is not None)

    @property
    def own_caches(self) -> list[KVCache]:
        """The KV caches that this process has."""
        return [kv_cache for kv_cache in self.kv_caches if kv_cache is not None]

    @property
    def planned_cache_bytes(self) -> int:
        """The memory of all KV caches, and of the text's keys and values, when they are there."""
        return cache_bytes(self.transformer, self.request, self.prompts.num_tokens)

    @property
    def is_busy_here(self) -> bool:
        """Whether the calling thread is making a chunk: whether this is asked in a callback."""
        return self._thread == threading.get_ident()

    def set_num_inference_steps(self, num_inference_steps: int) -> None:
        """
        Change the number of solver steps from the next chunk on.

        Raises:
            ValueError: If the scheduler cannot solve in so many steps.
        """
        check_counts(num_inference_steps=num_inference_steps)
        copy.deepcopy(self.scheduler).set_timesteps(num_inference_steps, device=self.device)
        self.num_inference_steps = num_inference_steps

    def chunks(self) -> Generator[DenoisedChunk, None, None]:
        """Yield the chunks in order; those of a video that is continued come first. Each is yielded when its latents
        are there, which is before its clean pass: see [`finish_chunk`]. At the end, however it comes, the caches are
        freed."""
        total = self.request.num_chunks
        try:
            self._allocate_caches()
            bar = self._progress_bar(itertools.count() if total is None else range(total))
            bar.set_description("Chunks")
            with bar:
                for index in itertools.count():
                    chunk = self._make_chunk(index)
                    if chunk is None:
                        return
                    yield chunk
                    bar.update()
        finally:
            self.kv_caches, self._clean_latents, self._clean_pass = [], {}, None

    def finish_chunk(self) -> None:
        """Run the clean pass of the chunk that was yielded last: write it to the caches, under the LoRAs that it was
        made with. To be called in the thread that iterates over the chunks, and by all ranks that share the stream,
        before anything is changed; if it is not, the next chunk begins with it."""
        with self._working():
            self._run_clean_pass()

    def end(self) -> None:
        """Let the other ranks know that no further chunk is made; the others cannot decide that."""
        if self._agreement.leads and not self._is_ended:
            self._is_ended = True
            self._agreement.order(None)

    def _receive_orders(self, index: int) -> ChunkOrders | None:
        """Return what chunk `index` is made with, as the first rank decides; None, once, at the end of the stream."""
        orders, new_index = None, index - self.request.num_condition_chunks
        loras = () if self._agreement.is_alone else lora_scales(self.transformer)
        if self._agreement.leads and not self.run.is_ending and index != self.request.num_chunks:
            orders = ChunkOrders(
                self.prompts.take_redirection(new_index),
                self.num_inference_steps,
                self.run.guidance_scale,
                self.run.attention_kwargs,
                loras,
            )
        orders = self._agreement.order(orders)
        self._is_ended = orders is None
        if orders is not None and not self._agreement.leads:
            self.prompts.take_redirection(new_index)  # this rank's own does not count
            check_loras(loras, orders.loras)
        return orders

    def _make_chunk(self, index: int) -> DenoisedChunk | None:
        """Make chunk `index`, but for its clean pass; None at the end of the stream."""
        with self._working():
            orders = self._receive_orders(index)
            return None if orders is None else self._next_chunk(index, orders)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Within this, the network runs. An error is told to the other ranks here, in this thread: they wait for it,
        while nobody may ask this thread for what it was to make."""
        with torch.no_grad(), self._show_run(self.run):
            self._thread = threading.get_ident()
            try:
                yield
            except BaseException as error:
                if not self._agreement.is_alone:  # the error has the KV caches in its traceback
                    self.failure = error
                self._agreement.fail(error)
            finally:
                self._thread = None

    def _next_chunk(self, index: int, orders: ChunkOrders) -> DenoisedChunk:
        self._run_clean_pass()  # of the chunk before
        new_index = index - self.request.num_condition_chunks
        self._ends_early = False
        if not self._agreement.leads:
            self.num_inference_steps = orders.num_inference_steps
            self.run.guidance_scale, self.run.attention_kwargs = orders.guidance_scale, orders.attention_kwargs
        stopwatch = Stopwatch(self.device)
        self._check_text()
        prompts, prompt_embeds, switched = self.prompts.advance(new_index, orders.redirection)
        conditioning = Conditioning(
            prompt_embeds,
            self.prompts.negative_embeds,
            self.run.guidance_scale,
            self._image_latents if index == 0 else None,
            self.run.attention_kwargs,
            self._agreement.branch_group,
            self.request.clean_pass,
        )
        carries_prompt = self.request.clean_pass != "text_free"
        if switched and carries_prompt and self.kv_caches[0] is not None:
            rewrite_history(self.transformer, self.kv_caches[0], self._clean_latents, conditioning)
        for kv_cache in self.own_caches:
            kv_cache.begin_chunk(
                self.request.chunk_size,
                opens_shot=[prompt.cuts for prompt in prompts],
                rope_offset=[prompt.shot_index * self.request.multi_shot_rope_offset for prompt in prompts],
            )
        if new_index < 0:
            latents = self._given_latents(index)
        else:
            latents = self._denoise(index, new_index, conditioning, orders.num_inference_steps)
        if index + 1 != self.request.num_chunks:  # nothing attends to the last one
            self._clean_pass = partial(self._write_clean, index, latents, conditioning)
        stopwatch.stop()
        return DenoisedChunk(latents, index, prompts, stopwatch)

    def _denoise(
        self, index: int, new_index: int, conditioning: Conditioning, num_inference_steps: int
    ) -> torch.Tensor:
        """Denoise a chunk from its noise; what the pipeline shows, and what a callback changes, goes through the run's
        state."""
        first_step = self._num_steps

        def iterate(timesteps: torch.Tensor) -> Iterable[torch.Tensor]:
            # Of second order, a solver has more timesteps than steps.
            self._num_steps = first_step + len(timesteps)
            if self.request.num_new_chunks is not None:
                num_chunks_left = self.request.num_new_chunks - new_index
                self.run.num_timesteps = first_step + num_chunks_left * len(timesteps)
            bar = self._progress_bar(total=len(timesteps))
            bar.set_description(f"Chunk {index} steps")
            bar.leave = False
            with bar:
                for timestep in timesteps:
                    if self._is_ending:
                        break
                    check_non_negative(at_most=MAX_GUIDANCE_SCALE, guidance_scale=self.run.guidance_scale)
                    check_attention_kwargs(self.run.attention_kwargs)
                    self.run.current_timestep = timestep
                    conditioning.guidance_scale = self.run.guidance_scale
                    conditioning.attention_kwargs = self.run.attention_kwargs
                    yield timestep
                    bar.update()
            self.run.current_timestep = None

        def on_step_end(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            return self._call_back(first_step + step, timestep, latents, conditioning)

        return solve(
            self.transformer,
            self._scheduler,
            self._initial_noise(new_index),
            self.kv_caches,
            conditioning,
            num_inference_steps=num_inference_steps,
            iterate=iterate,
            on_step_end=on_step_end if self._calls_back else None,
        )

    def _call_back(
        self, step: int, timestep: torch.Tensor, latents: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        tensors = {
            "latents": latents,
            "prompt_embeds": conditioning.prompt_embeds,
            "negative_prompt_embeds": conditioning.negative_prompt_embeds,
        }
        given = {name: tensors[name] for name in self.request.callback_tensor_inputs}
        returned = None if self._callback is None else self._callback(step, timestep, given)
        changed = self._agree_on_changes(check_returned(returned, tensors), given)
        self._check_text()
        embeds = [given[name] for name in ("prompt_embeds", "negative_prompt_embeds") if given.get(name) is not None]
        if any(version_of(tensor) is None for tensor in embeds):  # it may have changed in place what has no versions
            self._clear_text()
        if changed.get("prompt_embeds", conditioning.prompt_embeds) is not conditioning.prompt_embeds:
            conditioning.prompt_embeds = changed["prompt_embeds"].to(self.device)
            self.prompts.replace_embeds(conditioning.prompt_embeds)
        if changed.get("negative_prompt_embeds") is not None:
            conditioning.negative_prompt_embeds = changed["negative_prompt_embeds"].to(self.device)
            self.prompts.negative_embeds = conditioning.negative_prompt_embeds
        return changed.get("latents", latents).to(latents)

    def _agree_on_changes(
        self, changed: dict[str, torch.Tensor], given: dict[str, torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        """Return what the first rank's callback has changed, perhaps in place in what it was given; what it has set on
        the pipeline is set on every rank."""
        if self._agreement.is_alone:
            return changed
        run, loras = self.run, lora_scales(self.transformer)
        changed = {name: tensor for name, tensor in {**given, **changed}.items() if tensor is not None}
        told = self._agreement.order((list(changed), run.is_ending, run.guidance_scale, run.attention_kwargs, loras))
        names, self._ends_early, guidance_scale, attention_kwargs, first_loras = told
        if not self._agreement.leads:
            run.guidance_scale, run.attention_kwargs = guidance_scale, attention_kwargs
            check_loras(loras, first_loras)
        # To no rank the same tensor: all take it for changed, or none.
        return {name: self._agreement.tensor(lambda name=name: changed[name]).clone() for name in names}

    @property
    def _is_ending(self) -> bool:
        """Whether the chunk in progress ends after its current step. Ranks that share it all have to know: without a
        callback, after whose calls they agree, it is made to its end."""
        return self.run.is_ending if self._agreement.is_alone else self._ends_early

    def _check_text(self) -> None:
        """Have the text's keys and values computed again if they would come out differently now. To be called wherever
        others' code has run: it may have changed weights, or chosen another LoRA."""
        made_with = text_fingerprint(self.transformer)
        if made_with is None or made_with != self._text_made_with:
            self._clear_text()
        self._text_made_with = made_with

    def _clear_text(self) -> None:
        for kv_cache in self.own_caches:
            kv_cache.clear_text()

    def _run_clean_pass(self) -> None:
        if self._clean_pass is not None:
            clean_pass, self._clean_pass = self._clean_pass, None
            clean_pass()

    def _write_clean(self, index: int, latents: torch.Tensor, conditioning: Conditioning) -> None:
        """Write a chunk to the caches, and remember its latents, should they have to be written again."""
        finish(self.transformer, latents, self.kv_caches, conditioning)
        self._clean_latents[index] = latents
        cached = self.own_caches[0].cached_chunks
        self._clean_latents = {chunk: self._clean_latents[chunk] for chunk in cached}

    def _allocate_caches(self) -> None:
        request = self.request
        batch_size, _, _, height, width = request.latent_shape
        branches = range(2 if is_guided(request.guidance_scale) else 1)
        self.kv_caches = [
            None
            if self._agreement.branch not in (None, branch)
            else self.transformer.create_kv_cache(
                batch_size,
                height,
                width,
                window_size=request.window_size,
                sink_size=request.sink_size,
                multi_shot_sink=request.multi_shot_sink,
                relative_rope=request.relative_rope,
                num_frames=None if request.num_chunks is None else request.num_chunks * request.chunk_size,
                dtype=request.kv_cache_dtype,
                device=self.device,
                attention_density=request.attention_density,
            )
            for branch in branches
        ]

    def _given_latents(self, index: int) -> torch.Tensor:
        """Return the latents of a chunk of the video that is continued."""
        size = self.request.chunk_size
        assert self._video_latents is not None  # `num_condition_chunks` counts its chunks
        return self._video_latents[:, :, index * size : (index + 1) * size].to(self.device, torch.float32)

    def _initial_noise(self, new_index: int) -> torch.Tensor:
        """Return the chunk's own noise, drawn chunk by chunk so that a longer video begins like a shorter one."""
        return self._agreement.tensor(lambda: self._own_noise(new_index))

    def _own_noise(self, new_index: int) -> torch.Tensor:
        shape = self.request.latent_shape
        if self.request.noise is None:
            generators = self._generator if isinstance(self._generator, list) else [self._generator]
            on_host = all(generator.device.type == "cpu" for generator in generators)
            drawn_on = torch.device("cpu") if on_host else self.device
            noise = randn_tensor(shape, generator=self._generator, device=drawn_on, dtype=torch.float32)
            return to_device(noise, self.device)
        start = new_index * shape[2]
        given = self.request.noise[:, :, start : start + shape[2]].to(torch.float32).contiguous()
        return to_device(given, self.device)


def check_loras(own: tuple, first: tuple) -> None:
    """Raise a ValueError unless this rank has chosen the LoRAs that the first one has."""
    if own != first:
        raise ValueError(
            "This rank's LoRAs, or their scales, are not those of the first rank: load, choose and scale them on "
            "every rank."
        )


def _private_generator() -> torch.Generator:
    """Return a generator seeded once from the global random state, so that other draws from it do not matter."""
    seed = int(torch.randint(2**63 - 1, ()))
    return torch.Generator().manual_seed(seed)
