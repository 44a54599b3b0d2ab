"""Training of the toy's VAE: pictures first, then clips."""

import random

import pytest
import torch

from train_vae import STAGES, Settings, build_vae, draw_clips, for_pictures, stage_at, train, train_step
from world import SIDE, draw_scene, render


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae(8).eval()


def test_pictures_are_encoded_and_decoded_as_the_plain_network_does(vae):
    pixels = draw_clips("a", 2, 1)
    with torch.no_grad():
        plain = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(plain).sample
        with for_pictures(vae):
            quick = vae.encode(pixels).latent_dist.mean
            assert torch.allclose(vae.decode(plain).sample, decoded, atol=1e-5)
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=0)
    with torch.no_grad():  # and is itself again
        still = vae.encode(pixels.expand(-1, -1, 5, -1, -1)).latent_dist.mean
    assert still.shape[2] == 2
    torch.testing.assert_close(still[:, :, :1], plain)


def test_it_begins_as_a_network_that_repeats_pictures(vae):
    scene = draw_scene(random.Random(0), num_things=1)
    picture = torch.from_numpy(render(scene, 1)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(picture.expand(-1, -1, 9, -1, -1)).latent_dist.mean).sample
    assert decoded.shape[2] == 9
    for frames in (decoded[:, :, 1:5], decoded[:, :, 5:9]):
        torch.testing.assert_close(frames, frames[:, :, :1].expand_as(frames), atol=1e-5, rtol=0)


def test_clips_are_of_the_toy_world_and_a_function_of_the_seed():
    clips = draw_clips("seed", 3, 13)
    assert clips.shape == (3, 3, 13, SIDE, SIDE)
    assert clips.min() >= -1 and clips.max() <= 1
    assert torch.equal(clips, draw_clips("seed", 3, 13))
    assert not torch.equal(clips, draw_clips("other", 3, 13))
    assert draw_clips("whole", 1, 61).shape[2] == 61


def test_stages_grow_from_pictures_to_whole_videos():
    lengths = [stage_at(step / 1000)[0] for step in range(1000)]
    assert lengths[0] == 1 and lengths[-1] == 61 and lengths == sorted(lengths)
    assert STAGES[-1][0] == 1.0


def test_a_step_has_a_gradient_for_every_weight_that_its_clips_need(vae):
    loss, error = train_step(vae, draw_clips("b", 1, 9), torch.Generator().manual_seed(0), kl_weight=1e-5)
    loss.backward()
    missing = [name for name, parameter in vae.named_parameters() if parameter.grad is None]
    assert not missing
    assert loss > error > 0


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    checkpoint = tmp_path / "vae.checkpoint.pt"
    settings = {"steps": 2, "learning_rate": 1e-3, "kl_weight": 0.0, "width": 8, "seed": 0}
    torch.save({"settings": settings | {"width": 16}, "step": 1}, checkpoint)
    with pytest.raises(ValueError, match=r"'width': 16.*'width': 8"):
        train(build_vae(8), Settings(**settings), "cpu", checkpoint)


def test_what_is_trained_further_begins_with_clips():
    lengths = [stage_at(step / 1000, further=True)[0] for step in range(1000)]
    assert lengths[0] == STAGES[1][1] and lengths[-1] == 61 and lengths == sorted(lengths)
