"""What the evaluation asks a model for: stories of one shot, of several, with a prompt switch, a cut or an image.

All are drawn from the toy world by a seed: the same seed gives the same prompts, however many are made at a time.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from evaluation.marks import Expectation, expect
from longlive_diffusers import pixel_frames
from world import Scene, caption, draw_scene, redirect


@dataclass(frozen=True)
class Segment:
    """Successive chunks under one caption.

    Args:
        scene: The scene that is to be seen. The caption does not say where its things are.
        caption: The prompt of the chunks.
        expectation: What the chunks have to show.
        num_chunks: The number of chunks.
        begins: How the segment begins: "planned" is a shot that is known from the start, "switch" a new prompt within
            the shot, and "cut" a new shot that is requested while the video is made.
    """

    scene: Scene
    caption: str
    expectation: Expectation
    num_chunks: int
    begins: Literal["planned", "switch", "cut"] = "planned"


@dataclass(frozen=True)
class Story:
    """A video to make; `image` is the scene whose first frame it begins with. Planned segments come first."""

    segments: tuple[Segment, ...]
    image: Scene | None = None

    @property
    def num_chunks(self) -> int:
        return sum(segment.num_chunks for segment in self.segments)

    def chunks(self) -> Iterator[tuple[int, bool]]:
        """Yield, for each chunk, the index of its segment and whether it is the segment's first."""
        for index, segment in enumerate(self.segments):
            for chunk in range(segment.num_chunks):
                yield index, chunk == 0

    @property
    def outline(self) -> tuple:
        """What all stories of a batch must have in common."""
        return tuple((segment.num_chunks, segment.begins) for segment in self.segments), self.image is None


def _segment(scene: Scene, rng: random.Random, num_chunks: int, begins: str = "planned") -> Segment:
    text = caption(scene, rng)
    return Segment(scene, text, expect(scene, text), num_chunks, begins)


def single_shots(seed: str, count: int, num_chunks: int, *, num_things: int | None, held_out: bool) -> list[Story]:
    """Return stories of one shot; with `num_things=None`, they have one thing and two things in turn."""
    stories = []
    for index in range(count):
        rng = random.Random(f"{seed} {index}")
        scene = draw_scene(rng, num_things=num_things or 1 + index % 2, held_out=held_out)
        stories.append(Story((_segment(scene, rng, num_chunks),)))
    return stories


def multi_shots(seed: str, count: int, chunks_per_shot: int, num_shots: int = 3) -> list[Story]:
    stories = []
    for index in range(count):
        rng = random.Random(f"{seed} {index}")
        scenes = [draw_scene(rng, num_things=1 if rng.random() < 0.65 else 2) for _ in range(num_shots)]
        stories.append(Story(tuple(_segment(scene, rng, chunks_per_shot) for scene in scenes)))
    return stories


def cuts(seed: str, count: int, chunks_per_shot: int) -> list[Story]:
    """Return stories of two shots, the second of which is requested on the way."""
    stories = []
    for story in multi_shots(seed, count, chunks_per_shot, num_shots=2):
        first, second = story.segments
        second = Segment(second.scene, second.caption, second.expectation, second.num_chunks, "cut")
        stories.append(Story((first, second)))
    return stories


def _left_open(expectation: Expectation) -> set[str]:
    """Return what a caption of one thing does not say."""
    said = {"background": expectation.background, "size": expectation.things[0].size}
    return {name for name, value in said.items() if value is None}


def switches(seed: str, count: int, num_chunks: int, chunk_size: int) -> list[Story]:
    """Return stories of one shot of a thing that changes its motion, color or both in the middle, under a new prompt.

    The new caption mentions the background and the size only if the first one did: otherwise it might ask to change
    what the model was free to choose, and the shot could not go on as it was.
    """
    before = num_chunks // 2
    stories = []
    for index in range(count):
        rng = random.Random(f"{seed} {index}")
        scene = draw_scene(rng, num_things=1)
        first = _segment(scene, rng, before)
        later = redirect(scene.after(pixel_frames(before * chunk_size)), rng)
        second = _segment(later, rng, num_chunks - before, "switch")
        while _left_open(first.expectation) - _left_open(second.expectation):
            second = _segment(later, rng, num_chunks - before, "switch")
        # What the new caption leaves out has been on the screen since the first one.
        expected = second.expectation.or_as(first.expectation)
        second = Segment(second.scene, second.caption, expected, second.num_chunks, "switch")
        stories.append(Story((first, second)))
    return stories


def image_starts(seed: str, count: int, num_chunks: int) -> list[Story]:
    """Return stories of one shot that begins with an image: all that it shows stays, and moves as the caption says."""
    stories = []
    for index in range(count):
        rng = random.Random(f"{seed} {index}")
        scene = draw_scene(rng, num_things=1 + index % 2)
        segment = Segment(scene, caption(scene, rng), expect(scene), num_chunks)
        stories.append(Story((segment,), image=scene))
    return stories
