"""Build the tiny pipeline that comes with the package: python training/build_toy.py [--output DIR]

It is complete - tokenizer, text encoder, VAE, transformer, scheduler - and small enough to sit in a repository, so
that every example, test and command works offline on a CPU. The tokenizer is trained on the captions below. All other
weights are random, from a fixed seed, and trained on nothing; only their scale is chosen, so that a video of this
pipeline is a moving texture, neither flat nor clipped. Running this again gives the same files.
"""

import argparse
import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from longlive_diffusers.assets import toy_pipeline_path


SEED = 0
TEXT_DIM = 64
LATENT_CHANNELS = 16
LATENT_SIDE = 8  # times 16: videos of 128x128 pixels


def phrases(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


COLOURS = phrases("red|green|blue|yellow|orange|purple|pink|cyan|white|black|grey|brown|golden|silver|turquoise")
SIZES = phrases("small|large|tiny|huge|wide|tall|thin|round|bright|dark|striped|dotted")
SHAPES = phrases("circle|square|triangle|star|ring|cross|diamond|heart|ball|cube|line|dot|hexagon|wave|spiral|arrow")
MOTIONS = phrases("""moves left|moves right|moves up|moves down|bounces|bounces off the walls|spins slowly
spins quickly|falls|rises|grows|shrinks|stands still|swings from side to side|rolls across the ground
orbits the centre|fades in|fades out|zigzags|jumps twice|turns clockwise|drifts diagonally|accelerates
slows down and stops|pulses|leaves the frame|enters from the left|follows another shape|splits in two
changes its colour""")
BACKGROUNDS = phrases("""on a black background|on a white background|on a grey background|over a gradient
over a checkerboard|in front of stripes|in the fog|under a blue sky|at night|at sunset|at sunrise|in the rain
in the snow|on the water|in a forest|in a city street|on a beach|in the desert|between mountains|in a meadow
in space among the stars|above the clouds|in an empty room""")
SCENERY = phrases("""The scene transitions. |The camera pans slowly to the right.|The camera follows the subject.
A close-up shot.|A wide shot of the landscape.|Then the light changes.|It is raining.|Fire and smoke.
The sun is setting behind the mountains.|A fox runs through the forest.|A cat walks on the grass.
A dog sleeps on the beach.|A boat sails across the sea.|A lighthouse in a storm, waves breaking on the rocks.
A car drives through a city at night.|A bird flies over the lake.|A woman walks along a snowy street.
A man rides a bicycle down the hill.|Children play in the garden.|Red leaves fall from the trees.
A flower opens in the morning light.|A train passes a bridge.|Fish swim in clear water.
low quality, blurry, static, distorted|high quality, detailed, realistic, cinematic|first, second, third, last
zero one two three four five six seven eight nine ten|0 1 2 3 4 5 6 7 8 9""")

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
    for colour, shape, motion in itertools.product(COLOURS, SHAPES, MOTIONS):
        place, size, other = chance.choice(BACKGROUNDS), chance.choice(SIZES), chance.choice(COLOURS)
        subject = chance.choice([f"a {colour} {shape}", f"a {size} {colour} {shape}", f"the {colour} {shape}"])
        tail = chance.choice(
            ["", f" {place}", f" and then a {other} {chance.choice(SHAPES)} {chance.choice(MOTIONS)}"]
        )
        sentences.append(f"{subject} {motion}{tail}{chance.choice(['', '.'])}")
    return sentences + SCENERY * 50


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram pieces as T5 has them: padding is 0, `</s>` is appended, unknown characters fall back to their bytes."""
    special = ["<pad>", "</s>", "<unk>"]
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    words = pre_tokenizers.Metaspace()
    trained = Tokenizer(models.Unigram())
    trained.normalizer, trained.pre_tokenizer = normalizer, words
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-▁"
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=list(letters),
        show_progress=False,
    )
    trained.train_from_iterator(captions(), trainer)
    # The trainer looks for what words have in common, and so cuts up all of these few; as T5's, ours are to be whole.
    count = Counter(word for text in captions() for word, _ in words.pre_tokenize_str(normalizer.normalize_str(text)))
    pieces = {piece: score for piece, score in json.loads(trained.to_str())["model"]["vocab"] if piece not in special}
    pieces |= {word: math.log(number / count.total()) for word, number in count.items()}
    # Trained scores are sums of many threads; rounded, they do not depend on how the threads shared the work.
    pieces = sorted(
        ((piece, round(score, 3)) for piece, score in pieces.items()), key=lambda pair: (-pair[1], pair[0])
    )
    lowest = pieces[-1][1] - 10
    vocabulary = [(piece, 0.0) for piece in special] + pieces + [(f"<0x{byte:02X}>", lowest) for byte in range(256)]

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


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
    tokenizer = build_tokenizer()
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
