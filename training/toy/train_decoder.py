"""Train the tiny decoder of the embedded pipeline: python training/toy/train_decoder.py --output DIR

It learns to draw the true frames of clips of the toy world from the latents that the VAE makes of them. Its memory
reaches a few latent frames back and no further, so that short windows of long clips are enough: of one that does not
open its clip, the first latent frames are context alone. The loss weighs objects like that of the VAE, and what is
around them.

The transformer's latents are not quite those that the VAE makes of a video: a decoder that has seen true ones alone
draws shadows beside edges of the others. So `--start DIR` trains it further on clips of which half are the pipeline's
own; of these, it learns to draw the VAE's frames.

The clips are made once, before training. A killed run begins again. `--measure DIR` only compares a trained decoder
with the VAE, on clips that it has not seen.
"""

import argparse
import math
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from evaluate import load
from longlive_diffusers import LongLivePipeline, StreamingDecoder, TinyVideoDecoder, pixel_frames
from longlive_diffusers.assets import toy_lora_path, toy_pipeline_path
from longlive_diffusers.atomic_write import new_folder
from longlive_diffusers.frame_counts import TEMPORAL_SCALE
from longlive_diffusers.models.streaming_tiny_decoder import StreamingTinyDecoder
from longlive_diffusers.models.streaming_vae import encode_video, latent_statistics
from longlive_diffusers.pipelines.sharing import strip_local_paths
from longlive_diffusers.user_path import user_path
from one_line import run
from outputs import check_replaceable
from schedules import one_cycle
from train_vae import draw_clips, object_weights
from world import draw_sample


WRITTEN = ("README.md", "config.json", "diffusion_pytorch_model.safetensors")
CLIP_FRAMES = 61  # of a video of the toy world
WINDOW, CONTEXT = 8, 3  # in latent frames
BATCH = 4
GENERATED_BATCH = 16
HALO = 5  # in pixels
WIDTHS = (40, 32, 32)


def build_decoder() -> TinyVideoDecoder:
    """Return a decoder for the latents of `train_vae.py`: 8 times smaller in space, 4 times in time."""
    return TinyVideoDecoder(
        latent_channels=16,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        time_upscale=(True, True),
        space_upscale=(True, True),
        patch_size=2,
    )


def open_decoder(folder: Path) -> TinyVideoDecoder:
    return TinyVideoDecoder.from_pretrained(folder, torch_dtype=torch.float32)


def encode_clips(vae: AutoencoderKLWan, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw clips, and return their pixels, uint8 `[count, 3, 61, 64, 64]`, and normalized latents."""
    pixels, latents = [], []
    for index in tqdm(range(count), desc="encoding", unit="clip", mininterval=1):
        clip = draw_clips(f"{seed} decoder {index}", 1, CLIP_FRAMES)
        latents.append(encode_video(vae, clip))
        pixels.append(((clip + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(pixels), torch.cat(latents)


@torch.no_grad()
def generate_clips(pipe: LongLivePipeline, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make videos of the toy world's captions in 4 steps, and return the VAE's pixels and the latents like
    `encode_clips`."""
    rng, pixels, latents = random.Random(f"{seed} generated"), [], []
    for start in tqdm(range(0, count, GENERATED_BATCH), desc="generating", unit="batch", mininterval=1):
        videos = range(start, min(start + GENERATED_BATCH, count))
        with pipe.stream(
            [draw_sample(rng, 8, 2)[0].caption for _ in videos],
            num_frames=CLIP_FRAMES,
            num_inference_steps=4,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + index) for index in videos],
            max_sequence_length=pipe.tokenizer.model_max_length,
            output_type="uint8",
        ) as session:
            chunks = list(session)
        frames = np.concatenate([np.asarray(chunk.frames) for chunk in chunks], axis=1)
        pixels.append(torch.from_numpy(frames).permute(0, 4, 1, 2, 3))
        latents.append(torch.cat([chunk.latents for chunk in chunks], dim=2))
    return torch.cat(pixels), torch.cat(latents)


def draw_windows(
    pixels: torch.Tensor, latents: torch.Tensor, rng: random.Random, batch: int = BATCH
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """
    Draw windows of random clips, all from the same random moment.

    Returns:
        Latents `[batch, C, WINDOW, h, w]`; the pixels that they stand for, in [-1, 1], where only the last frame of
        the first latent frame counts, as if it opened a video; and how many of these frames are context alone.
    """
    clips = [rng.randrange(len(latents)) for _ in range(batch)]
    start = rng.randint(0, latents.shape[2] - WINDOW)
    first = TEMPORAL_SCALE * start
    frames = pixels[clips, :, first : first + pixel_frames(WINDOW)].float() / 127.5 - 1
    return latents[clips, :, start : start + WINDOW], frames, TEMPORAL_SCALE * CONTEXT if start else 0


def train(decoder: TinyVideoDecoder, pixels: torch.Tensor, latents: torch.Tensor, args: argparse.Namespace) -> None:
    """Train the decoder on these clips."""
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = one_cycle(optimizer, args.learning_rate, steps=args.steps, warmup=0.05)
    bar = tqdm(range(args.steps), desc="decoder", unit="step", mininterval=1)
    for _ in bar:
        window, frames, context = draw_windows(pixels, latents, rng)
        errors = (decoder(window)[0] - frames)[:, :, context:].square()
        loss = (errors * weights_around_objects(frames)[:, :, context:]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(dB=f"{decibels(errors.detach()):.1f}", refresh=False)


def weights_around_objects(clips: torch.Tensor) -> torch.Tensor:
    """Return the weight of each pixel of clips `[B, 3, frames, H, W]`: an object's also where one is near, because a
    small network draws halos around them, which a judge takes for things."""
    side = 2 * HALO + 1
    return torch.nn.functional.max_pool3d(object_weights(clips), (1, side, side), stride=1, padding=(0, HALO, HALO))


def decibels(squared_errors: torch.Tensor) -> float:
    """Return the PSNR in dB of squared errors of pixels in [-1, 1]."""
    return -10 * torch.log10(squared_errors.mean() / 4).item()


@torch.no_grad()
def compare(vae: AutoencoderKLWan, decoder: TinyVideoDecoder, seed: str, clips: int, frames: int) -> dict[str, float]:
    """Return the PSNR in dB of whole clips that are decoded chunk by chunk: of the tiny decoder and of the VAE against
    the true frames, and of the one against the other."""
    errors: dict[str, list[torch.Tensor]] = {"tiny": [], "VAE": [], "tiny against VAE": []}
    mean, std = latent_statistics(vae, vae.device)
    for index in range(clips):
        true = draw_clips(f"{seed} {index}", 1, frames)
        latents = encode_video(vae, true)
        tiny, full = StreamingTinyDecoder(decoder), StreamingDecoder(vae)
        chunks = latents.split(2, dim=2)
        made = torch.cat([tiny.decode(chunk) for chunk in chunks], dim=2)
        by_vae = torch.cat([full.decode(chunk * std + mean) for chunk in chunks], dim=2)
        for name, one, other in (("tiny", made, true), ("VAE", by_vae, true), ("tiny against VAE", made, by_vae)):
            errors[name].append((one - other).square().mean())
    return {name: decibels(torch.stack(of_clips)) for name, of_clips in errors.items()}


def time_chunks(vae: AutoencoderKLWan, decoder: TinyVideoDecoder, runs: int = 40) -> dict[str, float]:
    """Return the median milliseconds in which each decodes a chunk (8 frames) in mid-video, measured in turn."""
    streams = {"tiny": StreamingTinyDecoder(decoder), "VAE": StreamingDecoder(vae)}
    took: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(runs + 2):
        chunk = torch.randn(1, 16, 2, 8, 8)
        for name, stream in streams.items():
            began = time.perf_counter()
            stream.decode(chunk)
            took[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(times[2:]) for name, times in took.items()}


def report(vae: AutoencoderKLWan, decoder: TinyVideoDecoder) -> None:
    """Print how close the decoder is to true frames and to the VAE's, and how fast both are."""
    measured = compare(vae, decoder, "test", 16, CLIP_FRAMES)
    told = ", ".join(f"{name} {value:.2f} dB" for name, value in measured.items())
    print(f"16 clips of {CLIP_FRAMES} frames, decoded chunk by chunk: {told}")
    told = ", ".join(f"{name} {value:.1f} ms" for name, value in time_chunks(vae, decoder).items())
    print(f"a chunk of 8 frames, {torch.get_num_threads()} threads: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny decoder of the embedded pipeline on the toy world.")
    parser.add_argument(
        "--model",
        type=user_path,
        default=toy_pipeline_path(),
        help="The pipeline's folder (default: the embedded one).",
    )
    parser.add_argument("--start", type=user_path, help="The folder of a decoder to train further.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--output", type=user_path, help="The folder to write the decoder to; an earlier result is replaced."
    )
    task.add_argument("--measure", type=user_path, help="The folder of a trained decoder to measure.")
    parser.add_argument("--steps", type=int, default=3000, help="The number of updates (default: %(default)s).")
    parser.add_argument("--clips", type=int, default=384, help="The number of clips (default: %(default)s).")
    parser.add_argument(
        "--learning_rate", type=float, default=2e-3, help="The largest learning rate (default: %(default)s)."
    )
    parser.add_argument("--seed", type=int, default=0, help="The seed of weights and clips (default: 0).")
    args = parser.parse_args()
    if min(args.steps, args.clips) < 1:
        parser.error(f"--steps and --clips must be at least 1, got {args.steps} and {args.clips}")
    for option, folder in (("--start", args.start), ("--measure", args.measure)):
        if folder is not None and not (folder / "config.json").is_file():
            parser.error(f"{option}: there is no decoder in '{folder}'")
    if args.output is not None:
        check_replaceable(args.output, WRITTEN)
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning_rate must be a number above 0, got {args.learning_rate}")

    pipe = load(args.model, "cpu", lora=toy_lora_path(4))
    pipe.vae.requires_grad_(False)
    if args.measure is None:
        torch.manual_seed(args.seed)
        if args.start is None:
            decoder, clips = build_decoder(), encode_clips(pipe.vae, args.clips, args.seed)
        else:
            decoder, half = open_decoder(args.start).train(), args.clips // 2
            true, made = encode_clips(pipe.vae, args.clips - half, args.seed), generate_clips(pipe, half, args.seed)
            clips = torch.cat([true[0], made[0]]), torch.cat([true[1], made[1]])
        train(decoder, *clips, args)
        torch.nn.Module.to(decoder, dtype=torch.float16)  # diffusers' own warns of layers that are none
        with new_folder(args.output, replace=True) as folder:
            decoder.save_pretrained(folder)
            strip_local_paths(folder, ["."])  # of --start
        size = sum(file.stat().st_size for file in args.output.iterdir())
        print(
            f"{args.output}: {sum(parameter.numel() for parameter in decoder.parameters())} parameters, {size} bytes"
        )
    folder = args.output if args.measure is None else args.measure
    report(pipe.vae, open_decoder(folder))  # as rounded to float16


if __name__ == "__main__":
    sys.exit(run(main))
