"""Training of the embedded tiny decoder: windows of clips, and pixels that become those of the VAE's latents."""

import argparse
import random

import pytest
import torch
from diffusers import AutoencoderKLWan

from evaluate import load
from longlive_diffusers import TinyVideoDecoder
from longlive_diffusers.assets import toy_decoder_path, toy_lora_path, toy_pipeline_path
from longlive_diffusers.models.streaming_vae import normalize_latents
from train_decoder import (
    CONTEXT,
    HALO,
    WINDOW,
    build_decoder,
    compare,
    draw_windows,
    encode_clips,
    generate_clips,
    train,
    weights_around_objects,
)
from train_vae import OBJECT_WEIGHT
from world import SIDE


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(toy_pipeline_path() / "vae", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def clips(vae) -> tuple[torch.Tensor, torch.Tensor]:
    return encode_clips(vae, 2, seed=0)


def test_clips_are_whole_and_their_latents_normalized(vae, clips):
    pixels, latents = clips
    assert pixels.shape == (2, 3, 61, SIDE, SIDE) and pixels.dtype == torch.uint8
    assert latents.shape == (2, 16, 16, 8, 8)
    with torch.no_grad():
        encoded = vae.encode(pixels[1:].float() / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(latents[1:], normalize_latents(vae, encoded), atol=1e-4, rtol=0)


def test_generated_clips_are_the_vaes_frames_of_the_latents_beside_them():
    pipe = load(toy_pipeline_path(), "cpu", lora=toy_lora_path(4))
    pixels, latents = generate_clips(pipe, 2, seed=0)
    assert pixels.shape == (2, 3, 61, SIDE, SIDE) and pixels.dtype == torch.uint8
    assert latents.shape == (2, 16, 16, 8, 8)
    decoded = pipe.decode_latents(latents[1:, :, :4], "pt")  # [1, frames, 3, H, W]
    torch.testing.assert_close(pixels[1:, :, :13].transpose(1, 2) / 255, decoded, atol=0.5 / 255 + 1e-4, rtol=0)


def test_a_window_has_the_pixels_that_its_latents_stand_for():
    """Every pixel is the index of its frame, every latent the index of its latent frame."""
    pixels = torch.arange(61, dtype=torch.uint8).view(1, 1, 61, 1, 1).expand(3, 3, 61, 2, 2)
    latents = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(3, 16, 16, 1, 1)
    starts = set()
    for seed in range(40):
        window, frames, context = draw_windows(pixels, latents, random.Random(seed), batch=2)
        start = int(window[0, 0, 0])
        starts.add(start)
        assert window.shape == (2, 16, WINDOW, 1, 1) and frames.shape == (2, 3, 1 + 4 * (WINDOW - 1), 2, 2)
        indices = ((frames[0, 0, :, 0, 0] + 1) * 127.5).round().int().tolist()
        assert indices == list(range(4 * start, 4 * (start + WINDOW) - 3))
        assert context == (0 if start == 0 else 4 * CONTEXT)
    assert starts == set(range(16 - WINDOW + 1))


def test_what_is_around_an_object_weighs_as_much_as_it():
    clip = torch.zeros(1, 3, 2, 32, 32)
    clip[:, :, 1, 16:18, 16:18] = 1
    weights = weights_around_objects(clip)
    assert weights.shape == (1, 1, 2, 32, 32)
    expected = torch.ones(2, 32, 32)
    expected[1, 16 - HALO : 18 + HALO, 16 - HALO : 18 + HALO] = 1 + OBJECT_WEIGHT
    assert torch.equal(weights[0, 0], expected)


def test_the_memory_of_the_network_ends_within_the_context():
    torch.manual_seed(0)
    decoder, window = build_decoder(), torch.randn(1, 16, WINDOW, 8, 8)
    with torch.no_grad():
        whole, _ = decoder(torch.cat([torch.randn(1, 16, 4, 8, 8), window], dim=2))
        part, _ = decoder(window)
    count = 1 + 4 * (WINDOW - 1)
    scored = slice(4 * CONTEXT, None)
    torch.testing.assert_close(part[:, :, scored], whole[:, :, -count:][:, :, scored], atol=1e-5, rtol=0)


def test_training_brings_it_closer_and_repeats(clips):
    arguments = argparse.Namespace(seed=0, learning_rate=2e-3, steps=3)

    def trained() -> tuple[TinyVideoDecoder, float]:
        torch.manual_seed(0)
        decoder = build_decoder()
        train(decoder, *clips, arguments)
        with torch.no_grad():
            made, _ = decoder(clips[1][:1, :, :WINDOW])
        true = clips[0][:1, :, : made.shape[2]].float() / 127.5 - 1
        return decoder, (made - true).square().mean().item()

    torch.manual_seed(0)
    with torch.no_grad():
        untrained = build_decoder()(clips[1][:1, :, :WINDOW])[0]
    true = clips[0][:1, :, : untrained.shape[2]].float() / 127.5 - 1
    (one, error), (two, _) = trained(), trained()
    assert error < 0.8 * (untrained - true).square().mean()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_embedded_decoder_is_small_and_close_to_the_vae(vae):
    files = list(toy_decoder_path().iterdir())
    assert sum(file.stat().st_size for file in files) < 0.5e6
    decoder = TinyVideoDecoder.from_pretrained(toy_decoder_path(), torch_dtype=torch.float32)
    shapes, again = (
        {name: tensor.shape for name, tensor in model.state_dict().items()} for model in (decoder, build_decoder())
    )
    assert shapes == again  # as it would be trained once more
    measured = compare(vae, decoder, "a test", 3, 29)
    assert measured["tiny"] > measured["VAE"] - 3
    assert measured["tiny against VAE"] > 28
