"""Coefficients on the CPU, sums where the latents are: the same steps as those of the whole solver there."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from longlive_diffusers import LongLiveScheduler
from longlive_diffusers.schedulers.coordinates import step_by_coordinates


def samples(scheduler: LongLiveScheduler, num_steps: int, dtype: torch.dtype, by_coordinates: bool):
    """All latents of a chunk, under a velocity that bends, and is changed by hand after the second step."""
    scheduler.set_timesteps(num_steps)
    latents = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = (3 * latents).sin() + latents.roll(1, -1)
        if by_coordinates:
            step = super(LongLiveScheduler, scheduler).step
            latents = step_by_coordinates(scheduler, step, velocity, timestep, latents)
        else:
            (latents,) = UniPCMultistepScheduler.step(scheduler, velocity, timestep, latents, return_dict=False)
        if index == 1:
            latents = latents.clone()
            latents[:, :, 0] = 0.5
        yield latents


@pytest.mark.parametrize("options", [{}, {"solver_order": 1}, {"solver_order": 3}, {"disable_corrector": [0, 2]}])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 12, 50])
def test_steps_are_those_of_the_solver(options, num_steps):
    runs = (samples(LongLiveScheduler(**options), num_steps, torch.float32, by) for by in (True, False))
    for found, expected in zip(*runs, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 4e-6 * expected.abs().max()


def test_steps_are_in_the_precision_of_the_sample():
    runs = (samples(LongLiveScheduler(), 4, torch.float64, by) for by in (True, False))
    for found, expected in zip(*runs, strict=True):
        assert found.dtype == torch.float64  # the solver's noise levels are in float32
        assert (found - expected).abs().max() <= 2e-7 * expected.abs().max()
    assert all(latents.dtype == torch.bfloat16 for latents in samples(LongLiveScheduler(), 4, torch.bfloat16, True))


def test_an_error_leaves_the_solver_as_it_was():
    scheduler = LongLiveScheduler()
    sample = torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="set_timesteps"):
        step_by_coordinates(scheduler, super(LongLiveScheduler, scheduler).step, sample, 5, sample)
    assert scheduler.model_outputs == [None, None] and scheduler.last_sample is None


def test_gradients_reach_the_velocity_and_the_sample():
    scheduler = LongLiveScheduler()
    scheduler.set_timesteps(2)
    velocity, sample = (torch.ones(1, 1, 1, 1, 1, requires_grad=True) for _ in range(2))
    step = super(LongLiveScheduler, scheduler).step
    step_by_coordinates(scheduler, step, velocity, scheduler.timesteps[0], sample).sum().backward()
    before, after = scheduler.sigmas[:2].tolist()
    assert sample.grad.item() == pytest.approx(1, abs=1e-6)
    assert velocity.grad.item() == pytest.approx(after - before, abs=1e-6)
