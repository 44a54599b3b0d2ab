"""The sinusoids of a timestep: those of the reference, which computes them in float64."""

import math

import pytest
import torch

from longlive_diffusers.models.transformer_longlive import sinusoidal_embedding
from tests.support.tiny_pipeline import random_inputs, tiny_transformer


def expected_waves(timestep: float, channels: int) -> list[float]:
    """In Python's own numbers, which are float64."""
    half = channels // 2
    angles = [timestep * 10000 ** (-index / half) for index in range(half)]
    return [*map(math.cos, angles), *map(math.sin, angles)]


@pytest.mark.parametrize("timestep", [0.0, 1.0, 52.0, 999.0, 999.5])
@pytest.mark.parametrize("channels", [2, 16, 256])
def test_every_wave_is_rounded_once(timestep, channels):
    waves = sinusoidal_embedding(torch.tensor([[timestep]]), channels)
    assert waves.shape == (1, 1, channels) and waves.dtype == torch.float32
    torch.testing.assert_close(waves[0, 0], torch.tensor(expected_waves(timestep, channels)), atol=1e-7, rtol=0)


@torch.no_grad()
def test_the_network_gets_these_waves():
    model, inputs, received = tiny_transformer(), random_inputs(), []
    hook = model.condition_embedder.time_embedder.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    model(**inputs)
    hook.remove()
    (waves,) = received
    assert torch.equal(waves, sinusoidal_embedding(inputs["timestep"], model.config.freq_dim))
