"""Whole generations of the reference implementation, through the public pipeline."""

import pytest
import torch

from tests.support.golden_models import CHUNK_SIZE, golden_rollouts, load_rollout, pipeline_for, rollout_arguments


ROLLOUTS = golden_rollouts()


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollout_matches_reference(name):
    assert ROLLOUTS[name]["chunk_frames"] == CHUNK_SIZE
    latents = pipeline_for(name)(**rollout_arguments(name)).frames
    expected = load_rollout(name)["latents"]
    assert latents.shape == expected.shape
    torch.testing.assert_close(latents, expected, atol=2e-5, rtol=0)
