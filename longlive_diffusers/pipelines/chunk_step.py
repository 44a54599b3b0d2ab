"""One chunk of a video: a few solver steps from noise to clean latents, then the forward that the cache remembers.

Plain functions of a transformer, a scheduler, KV caches and prompt embeddings. A streaming session runs them
(`denoiser.py`), and any other code that makes chunks can call them as they are: they need no pipeline and keep no
state.

    chunk_step = solve (noise -> clean latents), then write_clean (clean latents -> the cache)

That second part, the *clean pass*, is one forward in five with four steps, and one in three with two. `clean_pass`
says what becomes of it:

- "full": the chunk's clean latents go through the network, at timestep 0 and with the prompt.
- "text_free": the same without cross-attention. The history then carries no prompt but what is seen of it, and a
  change of the prompt leaves nothing in it to be rewritten.
- "last": there is none. The cache keeps what the last step computed, of latents that were a little noisy still.

LongLive-2.0 (arXiv 2605.18739), streaming inference.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..models.kv_cache import KVCache, version_of
from ..models.transformer_longlive import LongLiveTransformer3DModel
from ..parallel.all_to_all import gather_parts


class Solver(Protocol):
    """What a chunk needs of a scheduler; `LongLiveScheduler` is one."""

    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, *, device: torch.device) -> None: ...

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *, return_dict: bool
    ) -> tuple: ...  # also `generator`, where it draws noise


CLEAN_PASSES = ("full", "text_free", "last")
"""What the cache remembers a chunk by, see above."""

OnStepEnd = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Called with a step's index, its timestep and the latents after it; returns the latents to continue with."""


@dataclass
class Conditioning:
    """
    What a chunk is conditioned on. It may be changed between two steps.

    Args:
        prompt_embeds: The prompt embeddings, `[B, L, D]`. The same tensor means the same prompt: its keys and values
            are cached.
        negative_prompt_embeds: The embeddings of the negative prompt; needed with guidance only.
        guidance_scale: The scale of classifier-free guidance; 1 and 0 mean no guidance.
        branch_group: The two ranks that compute one branch of guidance each, where they share the work; or None.
        first_frame: The latents `[B, C, 1, h, w]` that the chunk begins with (image to video), or None.
        attention_kwargs: Passed to the transformer: `{"scale": s}` scales its LoRA.
        clean_pass: What the cache remembers the chunk by, one of `CLEAN_PASSES`.
    """

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None = None
    guidance_scale: float = 1.0
    first_frame: torch.Tensor | None = None
    attention_kwargs: dict[str, Any] | None = None
    branch_group: dist.ProcessGroup | None = None
    clean_pass: str = "full"


def check_clean_pass(clean_pass: object) -> None:
    """Raise a ValueError unless it is one of `CLEAN_PASSES`."""
    if clean_pass not in CLEAN_PASSES:
        raise ValueError(f"`clean_pass` must be one of {CLEAN_PASSES}, got {clean_pass!r}.")


def chunk_step(
    transformer: LongLiveTransformer3DModel,
    scheduler: Solver,
    noise: torch.Tensor,
    kv_caches: Sequence[KVCache | None],
    conditioning: Conditioning,
    *,
    num_inference_steps: int,
    iterate: Callable[[torch.Tensor], Iterable[torch.Tensor]] = iter,
    on_step_end: OnStepEnd | None = None,
) -> torch.Tensor:
    """
    Denoise a chunk and write it to the caches, whose `begin_chunk` must have been called.

    Args:
        transformer: The network, possibly wrapped or compiled.
        scheduler: The solver; its state is overwritten, so give every stream its own copy.
        noise: The initial noise, `[B, C, F, h, w]`, float32, on the transformer's device.
        kv_caches: The cache of the prompt and, with guidance, that of the negative prompt; None in place of that of
            a branch that another rank computes.
        conditioning: What the chunk is conditioned on.
        num_inference_steps: The number of solver steps.
        iterate: Wraps the timesteps, like a progress bar. It may end early; the latents are then those after the last
            step that was taken.
        on_step_end: Called after every step, see [`OnStepEnd`].

    Returns:
        The chunk's latents, float32 `[B, C, F, h, w]`.
    """
    latents = solve(
        transformer,
        scheduler,
        noise,
        kv_caches,
        conditioning,
        num_inference_steps=num_inference_steps,
        iterate=iterate,
        on_step_end=on_step_end,
    )
    finish(transformer, latents, kv_caches, conditioning)
    return latents


def solve(
    transformer: LongLiveTransformer3DModel,
    scheduler: Solver,
    noise: torch.Tensor,
    kv_caches: Sequence[KVCache | None],
    conditioning: Conditioning,
    *,
    num_inference_steps: int,
    iterate: Callable[[torch.Tensor], Iterable[torch.Tensor]] = iter,
    on_step_end: OnStepEnd | None = None,
) -> torch.Tensor:
    """Denoise a chunk from noise to clean latents, float32; the arguments are those of [`chunk_step`]. Each forward
    writes the chunk's keys and values into the caches and attends to them; without a clean pass, the last one finishes
    the chunk there, unless `on_step_end` changes the latents after it."""
    # On the CPU, where the solver looks at them: asking a GPU for a number would wait for it.
    scheduler.set_timesteps(num_inference_steps, device=torch.device("cpu"))
    latents, last_step = noise, len(scheduler.timesteps) - 1
    drawn_from = step_generators(scheduler, noise)
    for step, timestep in enumerate(iterate(scheduler.timesteps)):
        latents = with_first_frame(latents, conditioning.first_frame)
        finishes = step == last_step and conditioning.clean_pass == "last"
        velocity = predict_velocity(transformer, latents, timestep, kv_caches, conditioning, finishes=finishes)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False, **drawn_from)[0]
        latents = with_first_frame(latents, conditioning.first_frame)
        if on_step_end is not None:
            before, version = latents, version_of(latents)
            latents = on_step_end(step, timestep, latents)
            if finishes and (latents is not before or version is None or version != version_of(latents)):
                for _, kv_cache in _branches(kv_caches, conditioning):
                    kv_cache.reopen_chunk()
    return latents


def step_generators(scheduler: Solver, noise: torch.Tensor) -> dict[str, list[torch.Generator]]:
    """Return what a solver that draws noise at its steps takes to draw it from, as arguments of `step`: a generator
    for each video, seeded by the video's initial noise. So the same noise gives the same chunk, on all ranks and
    whatever is made beside it."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    seeds = noise.float().flatten(1).contiguous().view(torch.int32).sum(1, dtype=torch.int64).tolist()
    return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


def finish(
    transformer: LongLiveTransformer3DModel,
    latents: torch.Tensor,
    kv_caches: Sequence[KVCache | None],
    conditioning: Conditioning,
) -> None:
    """Run the clean pass of the caches in which the chunk is not finished yet. Without clean passes, too: a chunk may
    have had no last step, because it was given or interrupted, or not in the cache of the negative prompt."""
    unfinished = [None if cache is None or cache.chunk.finished else cache for cache in kv_caches]
    write_clean(transformer, latents, unfinished, conditioning)


def predict_velocity(
    transformer: LongLiveTransformer3DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    kv_caches: Sequence[KVCache | None],
    conditioning: Conditioning,
    *,
    finishes: bool = False,
) -> torch.Tensor:
    """
    Predict the velocity of a chunk, float32; with guidance, it is `v_neg + s (v_pos - v_neg)`.

    Args:
        latents: The noisy latents, `[B, C, F, h, w]`.
        timestep: The timestep, a scalar; a first frame that is given has timestep 0 instead.
        finishes: Whether the caches are to keep what this forward computes.
        transformer, kv_caches, conditioning: See [`chunk_step`].
    """
    shape = (latents.shape[0], latents.shape[2])
    if timestep.device.type == "cpu":
        per_frame = torch.full(shape, float(timestep), dtype=torch.float32, device=latents.device)
    else:
        per_frame = timestep.to(torch.float32).expand(shape).clone()
    if conditioning.first_frame is not None:
        per_frame[:, 0] = 0
    branches = _branches(kv_caches, conditioning)
    guided = is_guided(conditioning.guidance_scale)
    if guided and len(kv_caches) == 1:
        raise ValueError(
            f"A `guidance_scale` of {conditioning.guidance_scale:g} needs a KV cache of the negative prompt, which a "
            "video has only if it begins with guidance: this one may only change to 1, which is none."
        )
    if conditioning.branch_group is None:
        branches = branches[: 2 if guided else 1]
    if finishes:
        for _, kv_cache in branches:
            kv_cache.finish_chunk()
    velocities = [
        _forward(transformer, latents, per_frame, prompt_embeds, kv_cache, conditioning)
        for prompt_embeds, kv_cache in branches
    ]
    if conditioning.branch_group is not None:
        velocities = gather_parts(velocities[0], conditioning.branch_group)
    if not guided:
        return velocities[0]
    velocity, negative = velocities
    return negative + conditioning.guidance_scale * (velocity - negative)


def write_clean(
    transformer: LongLiveTransformer3DModel,
    latents: torch.Tensor,
    kv_caches: Sequence[KVCache | None],
    conditioning: Conditioning,
) -> None:
    """Run the clean chunk through the network at timestep 0, once for each cache, which then holds the finished chunk
    and no longer a noisy one. The arguments are those of [`chunk_step`]."""
    # One timestep for each frame, like in a solver step, so that both share one graph when compiled.
    timestep = torch.zeros(latents.shape[0], latents.shape[2], device=latents.device)
    for prompt_embeds, kv_cache in _branches(kv_caches, conditioning):
        kv_cache.finish_chunk()
        text = None if conditioning.clean_pass == "text_free" else prompt_embeds
        _forward(transformer, latents, timestep, text, kv_cache, conditioning)


def rewrite_history(
    transformer: LongLiveTransformer3DModel,
    kv_cache: KVCache,
    clean_latents: Mapping[int, torch.Tensor],
    conditioning: Conditioning,
    *,
    rewritten: Sequence[bool] | None = None,
) -> None:
    """
    Rewrite the cached history so that it carries another prompt (LongLive 1.0, KV recache).

    Args:
        clean_latents: The clean latents `[B, C, chunk_size, h, w]` of all chunks that have a frame in the cache, by
            the index of the chunk.
        rewritten: Whose history it is, one value for each sample; None for all. That of the others stays as it is.
        transformer, kv_cache, conditioning: See [`chunk_step`]; the prompt is the new one.
    """
    chunk_size = kv_cache.chunk_size
    for frames in kv_cache.recache(rewritten):
        samples = [
            torch.stack([clean_latents[i // chunk_size][sample, :, i % chunk_size] for i in indices], dim=1)
            for sample, indices in enumerate(frames)
        ]
        write_clean(transformer, torch.stack(samples), [kv_cache], conditioning)  # [B, C, n, h, w]


def with_first_frame(latents: torch.Tensor, first_frame: torch.Tensor | None) -> torch.Tensor:
    """Return the chunk with its first frame replaced by the given one (image to video)."""
    return latents if first_frame is None else torch.cat([first_frame, latents[:, :, 1:]], dim=2)


def is_guided(guidance_scale: float) -> bool:
    """Whether a scale means classifier-free guidance: 1 does not and, by diffusers' convention, neither does 0."""
    return guidance_scale not in (0, 1)


def _branches(
    kv_caches: Sequence[KVCache | None], conditioning: Conditioning
) -> list[tuple[torch.Tensor | None, KVCache]]:
    """Return the prompt embeddings and the cache of each branch of guidance that this process computes."""
    embeds = (conditioning.prompt_embeds, conditioning.negative_prompt_embeds)
    return [(own, cache) for own, cache in zip(embeds, kv_caches, strict=False) if cache is not None]


def _forward(transformer, latents, timestep, prompt_embeds, kv_cache: KVCache, conditioning: Conditioning):
    return transformer(
        latents,
        timestep,
        prompt_embeds,
        kv_cache=kv_cache,
        attention_kwargs=conditioning.attention_kwargs,
        return_dict=False,
    )[0].float()
