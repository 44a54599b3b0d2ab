"""Build the tiny pipeline that comes with the package: python training/build_toy.py [--output DIR]

It is complete - tokenizer, text encoder, VAE, transformer, scheduler - and small enough to sit in a repository, so
that every example, test and command works offline on a CPU. The tokenizer is trained on the captions below. All other
weights are random, from a fixed seed, and trained on nothing; only their scale is chosen, so that a video of this
pipeline is a moving texture, neither flat nor clipped. Running this again gives the same files.
"""

import argparse
import itertools
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from toy_text import (
    SCENERY,
    WORDS_OF_BACKGROUNDS,
    WORDS_OF_COLOURS,
    WORDS_OF_MOTIONS,
    WORDS_OF_SHAPES,
    WORDS_OF_SIZES,
    build_tokenizer,
)
from transformers import UMT5Config, UMT5EncoderModel

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from longlive_diffusers.assets import toy_pipeline_path


SEED = 0
TEXT_DIM = 64
LATENT_CHANNELS = 16
LATENT_SIDE = 8  # times 16: videos of 128x128 pixels


CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-video
license: apache-2.0
tags: [diffusers, longlive]
---

# A toy: untrained

A complete LongLive pipeline that is a few megabytes small, so that examples, tests and commands run offline on a CPU.
**Its weights are random (seed {seed}) and trained on nothing**: a prompt changes the result, but what comes out is a
moving texture, not what the prompt says. Use it to try the interface, not to judge the method.

```python
import longlive_diffusers
from diffusers import DiffusionPipeline
from longlive_diffusers.assets import toy_pipeline_path

pipe = DiffusionPipeline.from_pretrained(toy_pipeline_path())
video = pipe("a red circle moves left").frames[0]  # [125, {side}, {side}, 3]
```

- Transformer: {millions:.2f} M parameters, {side}x{side} pixels, chunks of 2 latent frames.
- VAE: the structure of Wan2.2's (16 times in space, 4 times in time), 8 channels wide. The scale of the last
  convolution, `latents_mean` and `latents_std` were set so that pixels and latents have sensible ranges.
- Text encoder: a UMT5 of 2 layers, 64 wide. Tokenizer: {words} unigram pieces of English captions about moving shapes,
  any other character as its bytes.

Made by `python training/build_toy.py` of the longlive_diffusers repository; running it again gives the same files.
"""


def captions() -> list[str]:
    """A few thousand sentences in which every word above appears about as often as its likes."""
    chance = random.Random(SEED)
    sentences = []
    for colour, shape, motion in itertools.product(WORDS_OF_COLOURS, WORDS_OF_SHAPES, WORDS_OF_MOTIONS):
        place, size = chance.choice(WORDS_OF_BACKGROUNDS), chance.choice(WORDS_OF_SIZES)
        other = chance.choice(WORDS_OF_COLOURS)
        subject = chance.choice([f"a {colour} {shape}", f"a {size} {colour} {shape}", f"the {colour} {shape}"])
        tail = chance.choice(
            [
                "",
                f" {place}",
                f" and then a {other} {chance.choice(WORDS_OF_SHAPES)} {chance.choice(WORDS_OF_MOTIONS)}",
            ]
        )
        sentences.append(f"{subject} {motion}{tail}{chance.choice(['', '.'])}")
    return sentences + SCENERY * 50


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    torch.manual_seed(SEED + 1)
    config = UMT5Config(vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config).eval()


def build_vae() -> AutoencoderKLWan:
    """Of the Wan2.2 kind: 16 times smaller in space, 4 times in time."""
    torch.manual_seed(SEED + 2)
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    ).eval()
    calibrate_vae(vae)
    return vae


@torch.no_grad()
def calibrate_vae(vae: AutoencoderKLWan) -> None:
    """Make normal latents decode to visible pixels, and pictures encode to latents whose statistics are known."""
    generator = torch.Generator().manual_seed(SEED + 3)
    latents = torch.randn(4, LATENT_CHANNELS, 3, LATENT_SIDE, LATENT_SIDE, generator=generator)
    output = vae.decoder.conv_out
    for _ in range(2):  # the second round measures what the clamp cut off in the first
        pixels = vae.decode(latents).sample
        # Rounded, so that the files do not depend on how many threads computed the sums.
        mean, std = round(pixels.mean().item(), 2), round(pixels.std().item(), 2)
        output.weight.mul_(0.4 / std)
        output.bias.sub_(mean).mul_(0.4 / std)

    coarse = torch.rand(4, 3, 9, 8, 8, generator=generator) * 2 - 1
    pictures = torch.nn.functional.interpolate(coarse, size=(9, 128, 128), mode="trilinear")
    encoded = vae.encode(pictures).latent_dist.mean
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in encoded.mean(dim=(0, 2, 3, 4)).tolist()],
        latents_std=[round(value, 4) for value in encoded.std(dim=(0, 2, 3, 4)).tolist()],
    )


def build_transformer() -> LongLiveTransformer3DModel:
    torch.manual_seed(SEED + 4)
    transformer = LongLiveTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=4,
        chunk_size=2,
        sample_height=LATENT_SIDE,
        sample_width=LATENT_SIDE,
    ).eval()
    for block in transformer.blocks:
        # Attention to a text that is mostly padding hardly depends on the prompt, unless it is sharp.
        torch.nn.init.constant_(block.attn2.norm_q.weight, 4.0)
    return transformer


def build_pipeline() -> LongLivePipeline:
    tokenizer = build_tokenizer(captions(), max_length=512)
    return LongLivePipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        vae=build_vae(),
        transformer=build_transformer(),
        scheduler=LongLiveScheduler(),
        window_size=16,
        sink_size=4,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the tiny pipeline that comes with the package.")
    parser.add_argument(
        "--output", type=Path, default=toy_pipeline_path(), help="folder to write (default: its place)"
    )
    output = parser.parse_args().output
    pipeline = build_pipeline()
    pipeline.save_pretrained(output)
    parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    card = CARD.format(seed=SEED, millions=parameters / 1e6, side=16 * LATENT_SIDE, words=len(pipeline.tokenizer))
    (output / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: transformer of {parameters / 1e6:.2f} M parameters, {size / 2**20:.2f} MiB in all")
