"""The trained parts that the toy's transformer starts from are what their README says."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from toy_text import MAX_LENGTH
from train_vae import draw_clips, streamed_psnr
from transformers import AutoTokenizer, UMT5EncoderModel

from longlive_diffusers.models.streaming_vae import normalize_latents


PARTS = Path(__file__).parents[2] / "training" / "toy_parts"


def test_the_vae_keeps_clips_and_knows_its_statistics():
    vae = AutoencoderKLWan.from_pretrained(PARTS / "vae").eval()
    assert streamed_psnr(vae, "a test", 3, 29) > 29
    with torch.no_grad():
        latents = normalize_latents(vae, vae.encode(draw_clips("another", 4, 13)).latent_dist.mean)
    assert latents.mean().abs() < 0.2
    assert 0.7 < latents.std() < 1.3


def test_the_text_encoder_tells_who_is_where():
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "text" / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(PARTS / "text" / "text_encoder").eval()
    assert tokenizer.model_max_length == MAX_LENGTH
    texts = [
        f"a {a} circle moves left above a {b} circle that moves left" for a, b in (("red", "blue"), ("blue", "red"))
    ]
    tokens = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        embeds = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    for colour in ("red", "blue"):
        word = tokenizer(colour).input_ids[0]
        above, below = (embeds[row, tokens.input_ids[row].tolist().index(word)] for row in range(2))
        assert (above - below).norm() > 0.3 * above.norm()
