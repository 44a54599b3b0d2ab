"""Whole generations of the reference implementation, through the public pipeline."""

import pytest
import torch

from tests.support.golden_models import CHUNK_SIZE, TEXT_LENGTH, golden_pipeline, golden_rollouts, load_rollout


ROLLOUTS = golden_rollouts()


def shots_of(prompts: list[str], prefix: str) -> tuple[list[str], list[int]]:
    """The golden prompts of each chunk, as shot prompts and durations."""
    shots, durations = [], []
    for prompt in prompts:
        if not shots or prompt.startswith(prefix):
            shots.append(prompt.removeprefix(prefix))
            durations.append(0)
        durations[-1] += 1
    return shots, durations


def arguments_of(name: str) -> dict:
    settings, tensors = ROLLOUTS[name], load_rollout(name)
    shots, durations = zip(
        *(shots_of(p, settings["scene_cut_prefix"]) for p in settings["prompts_per_chunk"]), strict=True
    )
    arguments = {
        "shot_prompts": list(shots),
        "chunks_per_shot": list(durations),
        "latents": tensors["noise"],
        "window_size": settings["window_frames"],
        "sink_size": settings["sink_frames"],
        "multi_shot_sink": settings["multi_shot_sink"],
        "multi_shot_rope_offset": settings["multi_shot_rope_offset"],
        "num_inference_steps": settings["num_inference_steps"],
        "guidance_scale": settings["guidance_scale"],
        "relative_rope": settings["relative_rope"],
        "max_sequence_length": TEXT_LENGTH,
        "output_type": "latent",
    }
    if settings["image_conditioned"]:
        arguments["image_latents"] = tensors["initial_latents"]
    if settings["context_latent_frames"]:
        arguments["video_latents"] = tensors["initial_latents"]
    return arguments


def pipeline_for(name: str):
    return golden_pipeline(ROLLOUTS[name]["embed_keys"], load_rollout(name)["embeds"])


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollout_matches_reference(name):
    assert ROLLOUTS[name]["chunk_frames"] == CHUNK_SIZE
    latents = pipeline_for(name)(**arguments_of(name)).frames
    expected = load_rollout(name)["latents"]
    assert latents.shape == expected.shape
    torch.testing.assert_close(latents, expected, atol=2e-5, rtol=0)
