"""A world small enough to be learned on a laptop: plain shapes that glide over plain backgrounds, with captions.

    python training/toy/world.py --output data/toy --num_samples 2000

writes it as a dataset in LongLive-2.0's layout (see `training/data/layouts.py`), and

    python training/toy/world.py --prompts data/prompts.jsonl --num_samples 2000

the captions of the same videos alone (see `training/data/prompt_list.py`), for distillation. Everything a caption may
say - color, shape, size, motion, how many objects, the background - can be read back from the pixels (`judge.py`), so
a model that was trained on it can be judged without a person looking.

The picture is a torus: what leaves on one side enters on the other. So a motion can go on forever at the same speed,
and a video of any length has one right answer at every moment, which is what long videos are judged by. Two objects
stay in separate halves of the picture, so that they never meet. A thing starts at one of 4 x 4 places: no caption says
where, and a small network that need not learn about places can learn more about shapes.

Some combinations of color, shape and motion are held out: no training sample shows them, so what a model makes of them
is composed, not remembered.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from longlive_diffusers import VideoWriter, pixel_frames
from longlive_diffusers.atomic_write import check_new_file, write_text
from longlive_diffusers.user_path import user_path
from one_line import run
from outputs import check_is_folder


DURATIONS_FILE = "shot_durations.txt"  # as training/data/shot_folders.py says
SIDE = 64  # pixels
FPS = 24
SPEED = 1.0  # pixels per frame
PLACES = tuple(range(8, SIDE, 16))  # where things may start, along each axis
COLORS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 245),
    "yellow": (245, 220, 40),
    "pink": (245, 120, 215),
    "white": (245, 245, 245),
}
BACKGROUNDS = {"black": (12, 12, 16), "grey": (125, 125, 125), "brown": (100, 62, 30), "teal": (0, 105, 110)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 6.0, "large": 9.0}  # radius of the circle; other shapes have its area
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
ALONG = {"stacked": ("left", "right", "still"), "beside": ("up", "down", "still")}  # motions that keep to one half


@dataclass(frozen=True)
class Thing:
    """An object; `x`, `y` is its center in the first frame, in pixels from the upper left corner."""

    color: str
    shape: str
    size: str
    motion: str
    x: float
    y: float

    def after(self, frames: int) -> "Thing":
        """Return the same thing, `frames` frames later."""
        right, down = MOTIONS[self.motion]
        x, y = ((at + step * SPEED * frames) % SIDE for at, step in ((self.x, right), (self.y, down)))
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Scene:
    """What a shot shows. Of two things, the first is the upper one ("stacked") or the left one ("beside")."""

    background: str
    things: tuple[Thing, ...]
    arrangement: str | None = None

    def after(self, frames: int) -> "Scene":
        return replace(self, things=tuple(thing.after(frames) for thing in self.things))


@dataclass(frozen=True)
class Part:
    """A clip of a sample: a scene, its caption, its length in chunks, and whether a cut precedes it."""

    scene: Scene
    caption: str
    num_chunks: int
    cut: bool = True


def is_held_out(color: str, shape: str, motion: str) -> bool:
    """Whether a combination is held out. A fifth of them are; every pair of attributes is still seen in training."""
    indices = list(COLORS).index(color), SHAPES.index(shape), list(MOTIONS).index(motion)
    return (indices[0] + 2 * indices[1] + 3 * indices[2]) % 5 == 0


# ---------------------------------------------------------------------------------------------------------- drawing
def coverage(shape: str, radius: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return how much of each pixel a shape covers, from 0 to 1, by the pixel's distance to the shape's edge.

    Args:
        shape: The name of the shape.
        radius: The radius of the circle of the same area, in pixels.
        dx, dy: The pixel centers relative to the shape's center, in pixels; y points down.
    """
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.886 * radius
    elif shape == "triangle":
        inner = 0.7776 * radius  # radius of the inscribed circle: the distance of the three sides from the center
        slanted = 0.866 * np.abs(dx) - 0.5 * dy
        distance = np.maximum(dy, slanted) - inner
    elif shape == "cross":
        arm = 1.189 * radius
        long, short = np.maximum(np.abs(dx), np.abs(dy)), np.minimum(np.abs(dx), np.abs(dy))
        distance = np.maximum(long - arm, short - arm / 3)
    else:
        raise ValueError(f"A shape is one of {', '.join(SHAPES)}, got {shape!r}.")
    return np.clip(0.5 - distance, 0, 1)


def render(scene: Scene, num_frames: int) -> np.ndarray:
    """Draw the frames of a scene, uint8 `[num_frames, SIDE, SIDE, 3]`."""
    picture = np.empty((num_frames, SIDE, SIDE, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    pixels = np.arange(SIDE, dtype=np.float32) + 0.5
    time = np.arange(num_frames, dtype=np.float32)[:, None]
    for thing in scene.things:
        right, down = MOTIONS[thing.motion]
        dx = (pixels - (thing.x + SPEED * right * time) + SIDE / 2) % SIDE - SIDE / 2  # [frames, SIDE]
        dy = (pixels - (thing.y + SPEED * down * time) + SIDE / 2) % SIDE - SIDE / 2
        cover = coverage(thing.shape, SIZES[thing.size], dx[:, None, :], dy[:, :, None])[..., None]
        picture += cover * (np.array(COLORS[thing.color], np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- captions
def phrase(thing: Thing, rng: random.Random, article: str = "a") -> str:
    """Say `a large red circle`, for example; the size is left out half the time."""
    size = f"{thing.size} " if rng.random() < 0.5 else ""
    return f"{article} {size}{thing.color} {thing.shape}"


def verb(motion: str, rng: random.Random) -> str:
    if motion == "still":
        return rng.choice(["stays still", "stands still", "does not move"])
    return rng.choice([f"moves {motion}", f"is moving {motion}", f"slides {motion}", f"drifts {motion}"])


def caption(scene: Scene, rng: random.Random) -> str:
    """Say what a scene shows, in one of many ways; the upper or left one of two things comes first, and the background
    is left out one time in five."""
    first, *rest = scene.things
    text = f"{phrase(first, rng)} {verb(first.motion, rng)}"
    if rest:
        second = rest[0]
        near, far = ("above", "below it") if scene.arrangement == "stacked" else ("to the left of", "to its right")
        form = rng.choice(["{text} {near} {other} that {moves}", "{text} and {far} {other} {moves}"])
        other, moves = phrase(second, rng), verb(second.motion, rng)
        text = form.format(text=text, near=near, far=far, other=other, moves=moves)
    if rng.random() < 0.2:
        return text
    ground = scene.background
    form = rng.choice(["{} on a {} background", "{}, {} background", "on a {1} background, {0}", "{} over {}"])
    return form.format(text, ground)


# ---------------------------------------------------------------------------------------------------------- sampling
def draw_thing(rng: random.Random, motions: tuple[str, ...], held_out: bool) -> Thing:
    """Draw independent and uniform attributes, among the combinations that are held out or those that are not."""
    while True:
        color, shape, motion = rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(motions)
        if is_held_out(color, shape, motion) == held_out:
            break
    return Thing(color, shape, rng.choice(list(SIZES)), motion, rng.choice(PLACES), rng.choice(PLACES))


def draw_scene(rng: random.Random, *, num_things: int, held_out: bool = False) -> Scene:
    """Draw a scene of one thing or two; with `held_out`, all of its things are held-out combinations."""
    background = rng.choice(list(BACKGROUNDS))
    if num_things == 1:
        return Scene(background, (draw_thing(rng, tuple(MOTIONS), held_out),))
    if num_things != 2:
        raise ValueError(f"A scene has 1 thing or 2, got {num_things}.")
    arrangement = rng.choice(list(ALONG))
    axis = "y" if arrangement == "stacked" else "x"
    things = tuple(
        replace(draw_thing(rng, ALONG[arrangement], held_out), **{axis: center}) for center in (SIDE / 4, SIDE * 3 / 4)
    )
    return Scene(background, things, arrangement)


def redirect(scene: Scene, rng: random.Random, *, held_out: bool = False) -> Scene:
    """Draw how a scene of one thing goes on after a prompt switch: with another motion, another color, or both."""
    (thing,) = scene.things
    what = rng.choice([("motion",), ("motion",), ("color",), ("motion", "color")])
    while True:
        changed = thing
        if "motion" in what:
            changed = replace(changed, motion=rng.choice([name for name in MOTIONS if name != thing.motion]))
        if "color" in what:
            changed = replace(changed, color=rng.choice([name for name in COLORS if name != thing.color]))
        if is_held_out(changed.color, changed.shape, changed.motion) == held_out:
            return replace(scene, things=(changed,))
        what = ("motion", "color")  # this change alone may allow no combination


def draw_sample(rng: random.Random, num_chunks: int, chunk_size: int) -> list[Part]:
    """Draw a video: one, two or three shots, or one shot whose prompt changes on the way."""
    kind = rng.random()
    if kind < 0.15 and num_chunks >= 4:
        first = draw_scene(rng, num_things=1)
        length = rng.randint(2, num_chunks - 2)
        second = redirect(first.after(pixel_frames(length * chunk_size)), rng)
        lengths, scenes, cuts = [length, num_chunks - length], [first, second], [True, False]
    else:
        shots = 1 if kind < 0.55 else 2 if kind < 0.85 else 3
        shots = max(1, min(shots, num_chunks // 2))
        lengths = [2] * shots if num_chunks >= 2 else [num_chunks]
        for _ in range(num_chunks - sum(lengths)):
            lengths[rng.randrange(shots)] += 1
        scenes = [draw_scene(rng, num_things=1 if rng.random() < 0.65 else 2) for _ in lengths]
        cuts = [True] * shots
    triples = zip(scenes, lengths, cuts, strict=True)
    return [Part(scene, caption(scene, rng), length, cut) for scene, length, cut in triples]


def draw_indexed(seed: int, index: int, num_chunks: int, chunk_size: int) -> list[Part]:
    """Draw sample `index` of the dataset of a seed."""
    return draw_sample(random.Random(f"{seed} {index}"), num_chunks, chunk_size)


def write_sample(root: Path, name: str, parts: list[Part], chunk_size: int) -> None:
    """Write `video/<name>/000001.mp4 ...`, then their captions: a sample without captions is not complete."""
    videos, captions = root / "video" / name, root / "caption" / name
    videos.mkdir(parents=True, exist_ok=True)
    captions.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(parts):
        length = pixel_frames(part.num_chunks * chunk_size, opens_video=index == 0)
        with VideoWriter(videos / f"{index + 1:06d}.mp4", fps=FPS, crf=8) as writer:
            writer.write(render(part.scene, length))
    for file, text in caption_files(parts).items():
        (captions / file).write_text(text, encoding="utf-8")


def caption_files(parts: list[Part]) -> dict[str, str]:
    """The files of a sample's captions; the last one written says that the sample is complete."""
    entries = [{"caption": part.caption} | ({} if part.cut else {"cut": False}) for part in parts]
    files = {f"{index + 1:06d}.json": json.dumps(entry) + "\n" for index, entry in enumerate(entries)}
    return files | {DURATIONS_FILE: " ".join(str(part.num_chunks) for part in parts) + "\n"}


def draw_and_write(root: Path, seed: int, num_chunks: int, chunk_size: int, name: str) -> None:
    """Draw and write one sample of the dataset of a seed; `name` is its index."""
    write_sample(root, name, draw_indexed(seed, int(name), num_chunks, chunk_size), chunk_size)


def prompt_line(parts: list[Part]) -> str:
    """Return the captions of a sample as a line of a list of prompts."""
    shots = [
        {"prompt": part.caption, "chunks": part.num_chunks} | ({} if part.cut else {"cut": False}) for part in parts
    ]
    return json.dumps({"shots": shots} if len(shots) > 1 else {"prompt": parts[0].caption}) + "\n"


def missing_samples(root: Path, arguments: argparse.Namespace) -> list[str]:
    """
    Return the names of the samples that a folder does not have yet.

    Raises:
        ValueError: If it is a file, or has samples that these arguments would not write.
    """
    names, captions = [f"{index:06d}" for index in range(arguments.num_samples)], root / "caption"
    check_is_folder(root)
    found = sorted(path.name for path in captions.iterdir()) if captions.is_dir() else []
    complete = [name for name in found if (captions / name / DURATIONS_FILE).exists()]
    for name in complete:
        others = f"--output '{root}' has the sample {name}, which these arguments would not write: give another folder"
        if name not in names:
            raise ValueError(f"{others}, or more --num_samples than {arguments.num_samples}")
        parts = draw_indexed(arguments.seed, int(name), arguments.num_chunks, arguments.chunk_size)
        for file, text in caption_files(parts).items():
            if not (captions / name / file).exists() or (captions / name / file).read_text(encoding="utf-8") != text:
                raise ValueError(f"{others}, or its --seed and --num_chunks")
    return [name for name in names if name not in set(complete)]


def write_videos(root: Path, arguments: argparse.Namespace) -> None:
    todo = missing_samples(root, arguments)
    write = partial(draw_and_write, root, arguments.seed, arguments.num_chunks, arguments.chunk_size)
    with Pool(arguments.num_workers) as pool:
        for _ in tqdm(pool.imap_unordered(write, todo), total=len(todo), desc="toy world", unit="video"):
            pass


def write_prompts(path: Path, arguments: argparse.Namespace) -> None:
    """Write the captions of the samples that `write_videos` draws, one sample on each line."""
    samples = (
        draw_indexed(arguments.seed, index, arguments.num_chunks, arguments.chunk_size)
        for index in range(arguments.num_samples)
    )
    write_text(path, "".join(map(prompt_line, samples)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy world as a video dataset, or its captions alone.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=user_path, help="The folder to write; samples that are in it are kept.")
    target.add_argument("--prompts", type=user_path, help="The .jsonl file to write, with captions and no videos.")
    parser.add_argument(
        "--num_samples", type=int, default=2000, help="The number of videos to write (default: %(default)s)."
    )
    parser.add_argument(
        "--num_chunks", type=int, default=8, help="The length of each video in chunks (default: %(default)s)."
    )
    parser.add_argument(
        "--chunk_size", type=int, default=2, help="The number of latent frames of a chunk (default: %(default)s)."
    )
    parser.add_argument("--seed", type=int, default=0, help="The same seed writes the same videos (default: 0).")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=2,
        help="The number of processes that draw and write (default: %(default)s).",
    )
    arguments = parser.parse_args()
    if min(arguments.num_samples, arguments.num_chunks, arguments.chunk_size, arguments.num_workers) < 1:
        parser.error("--num_samples, --num_chunks, --chunk_size and --num_workers must be at least 1")
    if arguments.output is not None:
        write_videos(arguments.output, arguments)
        return
    try:
        path = check_new_file(arguments.prompts)
    except ValueError as error:
        parser.error(str(error))
    if path.suffix.lower() != ".jsonl":
        parser.error(f"--prompts must be a .jsonl file, not '{path}'")
    write_prompts(path, arguments)


if __name__ == "__main__":
    sys.exit(run(main))
