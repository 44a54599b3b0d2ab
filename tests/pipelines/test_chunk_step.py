"""The chunk step alone: what a pipeline makes can be made by plain functions, of a network that is wrapped as well."""

import pytest
import torch
from torch import nn

from longlive_diffusers.pipelines.chunk_step import Conditioning, chunk_step, solve, write_clean
from tests.support.tiny_pipeline import CHANNELS, CHUNK_SIZE, SIDE, tiny_arguments, tiny_cache, tiny_pipeline


NUM_CHUNKS = 3


class Wrapped(nn.Module):
    """As accelerate and DDP wrap a network: it can be called, and has none of its attributes."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.module = network

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randn(1, CHANNELS, NUM_CHUNKS * CHUNK_SIZE, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def embed(pipe, guidance_scale: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    return pipe.encode_prompt("a cat runs", "a dog", guidance_scale != 1, max_sequence_length=8)


def by_pipeline(pipe, noise: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    arguments = tiny_arguments(prompt="a cat runs", negative_prompt="a dog", num_frames=21, latents=noise)
    return pipe(**arguments, guidance_scale=guidance_scale).frames


@torch.no_grad()
def by_hand(pipe, transformer: nn.Module, noise: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    prompt_embeds, negative_prompt_embeds = embed(pipe, guidance_scale)
    conditioning = Conditioning(prompt_embeds, negative_prompt_embeds, guidance_scale)
    caches = [tiny_cache(pipe.transformer) for _ in range(1 if guidance_scale == 1 else 2)]
    latents = []
    for chunk in noise.split(CHUNK_SIZE, dim=2):
        for cache in caches:
            cache.begin_chunk(CHUNK_SIZE)
        latents.append(
            chunk_step(transformer, pipe.scheduler, chunk.contiguous(), caches, conditioning, num_inference_steps=2)
        )
    return torch.cat(latents, dim=2)


@pytest.mark.parametrize("wrap", [lambda network: network, Wrapped], ids=["bare", "wrapped"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_chunks_made_by_hand_are_the_pipelines(pipe, noise, wrap, guidance_scale):
    made = by_hand(pipe, wrap(pipe.transformer), noise, guidance_scale)
    assert torch.equal(made, by_pipeline(pipe, noise, guidance_scale))


@torch.no_grad()
def test_a_solve_can_end_early_and_its_steps_can_be_followed(pipe, noise):
    """As a roll-out in distillation does, which leaves the last steps to another pass."""
    conditioning, cache = Conditioning(embed(pipe, 1.0)[0]), tiny_cache(pipe.transformer)
    cache.begin_chunk(CHUNK_SIZE)
    seen = []

    def follow(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        seen.append((step, float(timestep), latents.clone()))
        return latents

    chunk = noise[:, :, :CHUNK_SIZE].contiguous()
    settings = {"num_inference_steps": 4, "on_step_end": follow}
    whole = solve(pipe.transformer, pipe.scheduler, chunk, [cache], conditioning, **settings)
    steps, timesteps, latents = zip(*seen, strict=True)
    assert steps == (0, 1, 2, 3) and timesteps == tuple(map(float, pipe.scheduler.timesteps))
    assert torch.equal(whole, latents[-1])
    seen.clear()
    part = solve(
        pipe.transformer,
        pipe.scheduler,
        chunk,
        [cache],
        conditioning,
        iterate=lambda all_steps: all_steps[:2],
        **settings,
    )
    assert len(seen) == 2 and torch.equal(part, latents[1])


@torch.no_grad()
def test_a_first_frame_is_kept(pipe, noise):
    first_frame = torch.full((1, CHANNELS, 1, SIDE, SIDE), 0.5)
    conditioning, cache = Conditioning(embed(pipe, 1.0)[0], first_frame=first_frame), tiny_cache(pipe.transformer)
    cache.begin_chunk(CHUNK_SIZE)
    chunk = noise[:, :, :CHUNK_SIZE].contiguous()
    latents = chunk_step(pipe.transformer, pipe.scheduler, chunk, [cache], conditioning, num_inference_steps=2)
    assert torch.equal(latents[:, :, :1], first_frame)


def test_gradients_flow_through_a_step(pipe, noise):
    """Through the velocity of the last step, which is what distribution matching trains."""
    conditioning, cache = Conditioning(embed(pipe, 1.0)[0].detach()), tiny_cache(pipe.transformer)
    cache.begin_chunk(CHUNK_SIZE)
    chunk = noise[:, :, :CHUNK_SIZE].contiguous()
    latents = solve(pipe.transformer, pipe.scheduler, chunk, [cache], conditioning, num_inference_steps=1)
    (gradient,) = torch.autograd.grad(latents.square().mean(), pipe.transformer.proj_out.weight)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    with torch.no_grad():
        write_clean(pipe.transformer, latents.detach(), [cache], conditioning)


def test_guidance_that_begins_in_mid_video_is_refused(pipe, noise):
    """Its negative prompt has no history; to end it is fine."""
    embeds, negative = embed(pipe, 3.0)
    conditioning = Conditioning(embeds, negative, guidance_scale=3.0)
    one = [tiny_cache(pipe.transformer)]
    one[0].begin_chunk(CHUNK_SIZE)
    with pytest.raises(ValueError, match="A `guidance_scale` of 3 needs a KV cache of the negative prompt"):
        chunk_step(pipe.transformer, pipe.scheduler, noise, one, conditioning, num_inference_steps=2)

    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = 5.0
        return {}

    with pytest.raises(ValueError, match="A `guidance_scale` of 5 needs a KV cache"):
        pipe(**tiny_arguments(callback_on_step_end=change))
