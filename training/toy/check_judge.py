"""Check whether the judge can be trusted: python training/toy/check_judge.py --num_scenes 400

It is shown true videos - as they are drawn, after writing and reading an mp4 file, and blurred and noisy, as a VAE
might leave them - and the chunks that it reads entirely right are counted. What must not fool it is in its tests.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.marks import expect, judge_chunk
from judge import read_chunk
from longlive_diffusers.video.reader import read_video
from longlive_diffusers.video.writer import VideoWriter
from one_line import run
from world import FPS, draw_scene, render


CHUNKS = (5, 8, 8)  # frames
NOISE = 6.0  # of 255
Change = Callable[[np.ndarray, int], np.ndarray]  # changes a video's frames, given the index of its scene


def unchanged(frames: np.ndarray, index: int) -> np.ndarray:
    return frames


def through_mp4(frames: np.ndarray, index: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        with VideoWriter(path, fps=FPS, crf=8) as writer:
            writer.write(frames)
        return read_video(path)[0]


def blurred(frames: np.ndarray, index: int) -> np.ndarray:
    """Blurred by one pixel (a binomial kernel) and noisy: 28 to 32 dB."""
    soft = frames.astype(np.float32)
    for axis in (1, 2):
        for _ in range(2):
            soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    noise = np.random.default_rng(index).normal(0, NOISE, frames.shape)
    return np.clip(soft + noise, 0, 255).round().astype(np.uint8)


def share_right(num_scenes: int, change: Change, *, seed: int = 0, description: str = "judge") -> tuple[float, float]:
    """Show the judge chunks of scenes with one thing and with two in turn.

    Returns:
        The share of chunks that are read without any mistake, and the PSNR of the changed frames in dB.
    """
    right, errors = [], []
    for index in tqdm(range(num_scenes), desc=description, unit="video"):
        rng = random.Random(f"{seed} {index}")
        scene = draw_scene(rng, num_things=1 + index % 2, held_out=rng.random() < 0.2)
        frames = render(scene, sum(CHUNKS))
        shown = change(frames, index)
        errors.append(np.square(shown.astype(np.float32) - frames).mean() / 255**2)
        for chunk in np.split(shown, np.cumsum(CHUNKS)[:-1]):
            right.append(all(judge_chunk(read_chunk(chunk), expect(scene)).values()))
    return sum(right) / len(right), float(-10 * np.log10(max(np.mean(errors), 1e-9)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the judge of the toy world on true videos.")
    parser.add_argument(
        "--num_scenes",
        type=int,
        default=400,
        help=f"The number of videos of {len(CHUNKS)} chunks to show it (default: 400).",
    )
    parser.add_argument("--seed", type=int, default=0, help="The seed of the scenes (default: 0).")
    arguments = parser.parse_args()
    if arguments.num_scenes < 1:
        parser.error(f"--num_scenes must be at least 1, got {arguments.num_scenes}")
    for name, change in (("as drawn", unchanged), ("mp4", through_mp4), ("blurred, noisy", blurred)):
        share, psnr = share_right(arguments.num_scenes, change, seed=arguments.seed, description=name)
        print(f"{name}: {100 * share:.2f} % of {arguments.num_scenes * len(CHUNKS)} chunks, {psnr:.1f} dB")


if __name__ == "__main__":
    sys.exit(run(main))
