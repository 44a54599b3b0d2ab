"""The roll-out of distillation: the video that the generator makes by itself, chunk by chunk, as it will in use.

It is made with the functions that streaming generation is made of: the KV cache with its sinks, pins and time
positions, the solver, the clean pass, and a rewritten history where a prompt switches within a shot. Nothing of it is
differentiated but one forward of each chunk, at the *exit step*: the steps before it run without gradients, and its
prediction of the clean chunk is what the loss sees, what enters the video, and what later chunks are conditioned on,
detached. (The reference writes the exit step's keys and values into the cache with their gradients, which then leak
into later chunks' losses, through values that the clean pass has overwritten.) Self Forcing, arXiv 2506.08009.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from longlive_diffusers import LongLiveScheduler, LongLiveTransformer3DModel
from longlive_diffusers.models.kv_cache import KVCache, check_window
from longlive_diffusers.models.layer_kv_cache import resolve_kv_cache_dtype
from longlive_diffusers.pipelines.chunk_step import (
    Conditioning,
    predict_velocity,
    rewrite_history,
    solve,
    with_first_frame,
    write_clean,
)


@dataclass(frozen=True)
class ChunkPlan:
    """
    What conditions the chunks of a batch of videos.

    Args:
        prompt_embeds: The prompt embeddings of each chunk, `[B, L, D]`; the same tensor where they are the same.
        shot_index: The index of each video's shot, for each chunk, `[chunks][B]`.
        cuts: Whether each chunk opens a shot, for each video, `[chunks][B]`.
        switches: Whether each video's prompt changes at a chunk, within a shot, `[chunks][B]`.
        rewrites: Whether history is rewritten at a chunk: where any video switches, in this batch or, where processes
            have to run the same forwards, in another's. Only that of the videos that switch changes.
        first_frame: The latents `[B, C, 1, h, w]` that the videos begin with (image to video), or None.
    """

    prompt_embeds: Sequence[torch.Tensor]
    shot_index: Sequence[Sequence[int]]
    cuts: Sequence[Sequence[bool]]
    switches: Sequence[Sequence[bool]]
    rewrites: Sequence[bool]
    first_frame: torch.Tensor | None = None

    @classmethod
    def of_batch(cls, batch: dict[str, torch.Tensor], device: torch.device, *, uses_image: bool) -> "ChunkPlan":
        """
        Return the plan of a batch of a `PromptDataset`.

        Args:
            batch: The collated items.
            device: The device of the network.
            uses_image: Whether the videos begin with the images of the batch, if it has any.
        """
        embeds: list[torch.Tensor] = []
        before: torch.Tensor | None = None
        for own in batch["prompt_embeds"].unbind(1):  # [B, L, D]
            # The keys and values of a text are cached for as long as it is the same tensor.
            embeds.append(embeds[-1] if before is not None and torch.equal(own, before) else own.to(device))
            before = own
        image = batch.get("first_frame") if uses_image else None
        return cls(
            prompt_embeds=embeds,
            shot_index=batch["shot_index"].T.tolist(),
            cuts=batch["cuts"].T.tolist(),
            switches=batch["switches"].T.tolist(),
            rewrites=batch["switches"].any(dim=0).tolist(),
            first_frame=None if image is None else image.to(device),
        )

    @property
    def num_chunks(self) -> int:
        return len(self.prompt_embeds)

    @property
    def num_videos(self) -> int:
        return len(self.prompt_embeds[0])


def roll_out(
    transformer: LongLiveTransformer3DModel,
    scheduler: LongLiveScheduler,
    noise: torch.Tensor,
    plan: ChunkPlan,
    kv_cache: KVCache,
    *,
    num_inference_steps: int,
    exit_step: int,
    multi_shot_rope_offset: float,
    differentiated: Sequence[int] = (),
) -> list[torch.Tensor]:
    """
    Make videos without guidance, chunk by chunk.

    Args:
        transformer: The generator, possibly wrapped.
        scheduler: The solver; not changed.
        noise: The initial noise of the whole videos, `[B, C, F, h, w]`, float32.
        plan: What the chunks are conditioned on.
        kv_cache: An empty cache for these videos; afterwards it holds their last frames.
        num_inference_steps: The number of solver steps that the generator is trained for.
        exit_step: The step, from 0, whose prediction of the clean chunk ends the chunk.
        multi_shot_rope_offset: The distance in time positions added at each cut.
        differentiated: The chunks whose prediction carries a gradient, by index.

    Returns:
        The clean latents of each chunk, float32 `[B, C, chunk_size, h, w]`.
    """
    solver, size = copy.deepcopy(scheduler), kv_cache.chunk_size
    chunks: list[torch.Tensor] = []
    clean: dict[int, torch.Tensor] = {}  # by chunk, for as long as one of its frames is cached
    for index in range(plan.num_chunks):
        first_frame = plan.first_frame if index == 0 else None
        conditioning = Conditioning(plan.prompt_embeds[index], first_frame=first_frame)
        with torch.no_grad():
            if plan.rewrites[index]:
                rewrite_history(transformer, kv_cache, clean, conditioning, rewritten=plan.switches[index])
            kv_cache.begin_chunk(
                size,
                opens_shot=list(plan.cuts[index]),
                rope_offset=[shot * multi_shot_rope_offset for shot in plan.shot_index[index]],
            )
            noisy = solve(
                transformer,
                solver,
                noise[:, :, index * size : (index + 1) * size].contiguous(),
                [kv_cache],
                conditioning,
                num_inference_steps=num_inference_steps,
                iterate=lambda timesteps: islice(timesteps, exit_step),
            )
        noisy = with_first_frame(noisy, first_frame)
        with torch.set_grad_enabled(index in differentiated):
            timestep, sigma = solver.timesteps[exit_step], solver.sigmas[exit_step]
            velocity = predict_velocity(transformer, noisy, timestep, [kv_cache], conditioning)
            x0 = with_first_frame(noisy - sigma * velocity, first_frame)  # as the solver itself computes it
        chunks.append(x0)
        clean[index] = x0.detach()
        with torch.no_grad():
            write_clean(transformer, clean[index], [kv_cache], conditioning)
        clean = {chunk: clean[chunk] for chunk in kv_cache.cached_chunks}
    return chunks


@dataclass(frozen=True)
class RolloutCaches:
    """What the KV caches of roll-outs are like; see `create_kv_cache`."""

    window_size: int
    sink_size: int
    multi_shot_sink: bool
    dtype: torch.dtype | str

    def check(self, network: LongLiveTransformer3DModel) -> None:
        """Raise a ValueError if a network cannot have such a cache."""
        check_window(self.window_size, self.sink_size, network.config.chunk_size, self.multi_shot_sink)
        resolve_kv_cache_dtype(self.dtype, network.config.attention_head_dim)

    def create(self, network: LongLiveTransformer3DModel, noise: torch.Tensor) -> KVCache:
        """Create the cache of a roll-out from `noise`, `[B, C, F, h, w]`."""
        batch, _, frames, height, width = noise.shape
        return network.create_kv_cache(
            batch,
            height,
            width,
            window_size=self.window_size,
            sink_size=self.sink_size,
            multi_shot_sink=self.multi_shot_sink,
            num_frames=frames,
            dtype=self.dtype,
            device=noise.device,
        )
