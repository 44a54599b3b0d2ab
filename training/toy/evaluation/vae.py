"""How well the VAE alone, or with a tiny decoder, reproduces true videos: no transformer can do better with it."""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from evaluation.marks import expect, judge_chunk
from evaluation.sections import Evaluation
from evaluation.tables import COLUMNS, Table, chunk_shares, shot_shares
from evaluation.videos import JudgedChunk
from judge import read_chunk
from longlive_diffusers import StreamingDecoder, StreamingEncoder, StreamingTinyDecoder, TinyVideoDecoder, pixel_frames
from longlive_diffusers.models.streaming_vae import normalize_latents
from world import draw_scene, render


BATCH = 8  # clips at a time


def vae(evaluation: Evaluation) -> list[Table]:
    """Measure PSNR and the judge's marks, over clips of the training length and of several times that length."""
    settings, size = evaluation.settings, evaluation.chunk_size
    quality = Table("VAE: streamed encoding and decoding", ("", "clips", "PSNR, dB", "worst clip", "last chunk"))
    judged = Table(
        "What the judge reads off true videos, before and after the VAE",
        ("", "clips", *COLUMNS, "whole clips"),
        note="Percent of chunks; `whole clips`: of clips that are right throughout. No model can do better than this.",
    )
    lengths = {settings.num_chunks: settings.num_prompts}
    lengths[settings.num_chunks * settings.long_factor] = settings.num_long_prompts
    for num_chunks, count in lengths.items():
        frames = pixel_frames(num_chunks * size)
        keyed = {"clips": count, "num_chunks": num_chunks, "chunk_size": size, "seed": settings.seed}
        measured = evaluation.store.get(
            f"vae/{frames} frames",
            keyed,
            lambda num_chunks=num_chunks, count=count: reconstruct(evaluation, num_chunks, count),
        )
        errors = np.array(measured["errors"])  # [clips, chunks]
        weights = np.array([pixel_frames(size, opens_video=index == 0) for index in range(num_chunks)]) / frames
        clips = errors @ weights
        name = f"{frames} frames"
        quality.rows.append([name, count, *(decibels(error) for error in (clips.mean(), clips.max()))])
        quality.rows[-1].append(decibels(errors[:, -1].mean()))
        for source in ("truth", "reconstruction"):
            videos = [[JudgedChunk(**chunk) for chunk in clip] for clip in measured[source]]
            judged.rows.append([f"{source}, {name}", count, *chunk_shares(videos), shot_shares(videos)[0]])
    return [quality, judged]


def decibels(error: float) -> float:
    """Return the PSNR of a mean squared error of pixels in [0, 1]; at most that of rounding to 8 bits."""
    return -10 * math.log10(max(error, 1 / 255**2 / 12))


def reconstruct(evaluation: Evaluation, num_chunks: int, count: int) -> dict[str, list]:
    """Encode and decode clips of the toy world, chunk by chunk.

    Returns:
        `errors`: mean squared errors of pixels in [0, 1], one for each clip and chunk; `truth` and `reconstruction`:
        the judged chunks of each clip.
    """
    scenes = [
        draw_scene(random.Random(f"vae {evaluation.settings.seed} {index}"), num_things=1 + index % 2)
        for index in range(count)
    ]
    model, size = evaluation.pipe.vae, evaluation.chunk_size
    result: dict[str, list] = {name: [[] for _ in scenes] for name in ("errors", "truth", "reconstruction")}
    with tqdm(total=count * num_chunks, desc=f"VAE, {num_chunks} chunks", unit="chunk") as bar:
        for first in range(0, count, BATCH):
            batch = scenes[first : first + BATCH]
            encoder, decode = StreamingEncoder(model), decode_with(model, evaluation.decoder)
            start = 0
            for index in range(num_chunks):
                length = pixel_frames(size, opens_video=index == 0)
                true = np.stack([render(scene.after(start), length) for scene in batch])
                pixels = torch.from_numpy(true).permute(0, 4, 1, 2, 3).to(model.device, model.dtype) / 127.5 - 1
                decoded = decode(encoder.encode(pixels)).float().cpu().permute(0, 2, 3, 4, 1).numpy() / 2 + 0.5
                for clip, scene in enumerate(batch, start=first):
                    made = decoded[clip - first]
                    result["errors"][clip].append(float(((made - true[clip - first] / 255) ** 2).mean()))
                    for name, frames in (("truth", true[clip - first]), ("reconstruction", made)):
                        reading = read_chunk(frames)
                        marks = judge_chunk(reading, expect(scene))
                        result[name][clip].append({"segment": 0, "marks": marks, "seen": str(reading)})
                start += length
                bar.update(len(batch))
    return result


def decode_with(model: AutoencoderKLWan, decoder: TinyVideoDecoder | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what decodes the next latents of the VAE (not normalized) to pixels: the VAE or a tiny decoder."""
    if decoder is None:
        return StreamingDecoder(model).decode
    stream = StreamingTinyDecoder(decoder)
    return lambda latents: stream.decode(normalize_latents(model, latents))
