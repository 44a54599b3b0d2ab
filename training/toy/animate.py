"""Make the moving picture of the README: python training/toy/animate.py --output training/toy/toy.webp

The embedded pipeline (or another one of the toy world) makes four videos side by side, each under the prompt that it
is made from at that moment: one prompt, two things, a video of three shots, and a prompt that changes on the way.
"""

import argparse
import itertools
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.atomic_write import check_new_file, new_file
from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.user_path import user_path
from one_line import run
from world import FPS


NUM_CHUNKS = 12
NUM_STEPS = 30  # solver steps of each chunk
SIDE = 192  # pixels of a video in the picture
TEXT_HEIGHT = 62
GAP = 8
EVERY = 2  # frames of the videos for one of the picture


@dataclass(frozen=True)
class Clip:
    """A video: its prompts by the chunk that they begin with, and whether a new prompt is a new shot."""

    title: str
    prompts: dict[int, str]
    cuts: bool = False


CLIPS = (
    Clip("one prompt", {0: "a large red circle moves right on a black background"}),
    Clip(
        "two things",
        {0: "a large white cross is moving left above a large white triangle that is moving left over brown"},
    ),
    Clip(
        "three shots",
        {
            0: "a large white cross moves left on a brown background",
            4: "a small green triangle moves down on a teal background",
            8: "a large pink circle moves right on a grey background",
        },
        cuts=True,
    ),
    Clip(
        "a prompt that changes",
        {
            0: "a large yellow square moves up on a teal background",
            6: "a large yellow square moves down on a teal background",
        },
    ),
)


def main() -> None:
    """Make the videos, and write them as one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=toy_pipeline_path(), help="The folder of a pipeline (default: the embedded one)."
    )
    parser.add_argument("--output", type=user_path, required=True, help="The .webp file to write.")
    parser.add_argument("--seed", type=int, default=0, help="The seed of the videos' noise (default: 0).")
    args = parser.parse_args()
    if args.output.suffix != ".webp":  # a GIF would be ten times as large
        raise ValueError(f"--output is a .webp file, got '{args.output}'")
    check_new_file(args.output)
    pipe = DiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(CLIPS) * NUM_CHUNKS, unit="chunk") as bar:
        columns = [list(captioned_frames(pipe, clip, args.seed, bar)) for clip in CLIPS]
    pictures = [side_by_side(frames) for frames in zip(*columns, strict=True)][::EVERY]
    with new_file(args.output) as file:
        first, *others = pictures
        duration = round(1000 * EVERY / FPS)  # of each picture, in milliseconds
        first.save(
            file, format="webp", save_all=True, append_images=others, duration=duration, loop=0, quality=80, method=6
        )


def captioned_frames(pipe: LongLivePipeline, clip: Clip, seed: int, bar: tqdm) -> Iterator[Image.Image]:
    """Yield the frames of a video, each under the prompt of its chunk."""
    settings = {
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": 2.0,
        "generator": torch.Generator().manual_seed(seed),
    }
    with pipe.stream(clip.prompts[0], **settings) as session:
        for chunk in itertools.islice(session, NUM_CHUNKS):
            for frame in chunk.frames[0]:
                yield under_caption(frame, clip.title, chunk.prompt)
            if clip.cuts and chunk.index + 1 in clip.prompts:
                session.cut(clip.prompts[chunk.index + 1])
            elif chunk.index + 1 in clip.prompts:
                session.prompt = clip.prompts[chunk.index + 1]
            bar.update()


def under_caption(frame: np.ndarray, title: str, prompt: str) -> Image.Image:
    """Return a frame `[H, W, 3]` in [0, 1] enlarged, with text above it."""
    picture = Image.new("RGB", (SIDE, TEXT_HEIGHT + SIDE), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), title, fill="black", font=ImageFont.load_default(12))
    draw.text((0, 16), "\n".join(textwrap.wrap(prompt, 34)), fill="#555555", font=ImageFont.load_default(11))
    pixels = Image.fromarray((255 * frame).round().astype(np.uint8))
    picture.paste(pixels.resize((SIDE, SIDE), Image.Resampling.NEAREST), (0, TEXT_HEIGHT))
    return picture


def side_by_side(pictures: tuple[Image.Image, ...]) -> Image.Image:
    """Return pictures of one size next to each other."""
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for index, picture in enumerate(pictures):
        row.paste(picture, (index * (width + GAP), 0))
    return row


if __name__ == "__main__":
    sys.exit(run(main))
