"""Makes the videos of stories in batches, chunk by chunk, and hands each chunk to the judge; memory does not grow with
the videos' length.

Every video has noise of its own, from the seed and its number, so that it does not depend on the size of the batches
that it was made in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from evaluation.marks import STEADY, Marks, is_steady, judge_chunk
from evaluation.scenarios import Story
from judge import Reading, read_chunk
from longlive_diffusers import LongLivePipeline, pixel_frames
from world import render


@dataclass(frozen=True)
class Sampling:
    """How videos are made.

    Args:
        sinks: With the pipeline's attention sinks and pinned shot beginnings, or without any.
        relative_rope: Count time positions from the cached frames.
        kv_cache_dtype: "nvfp4" or "fp8": how keys and values are stored; None: as the network computes.
        max_sequence_length: Tokens that prompts are padded to, as in training.
    """

    num_inference_steps: int
    guidance_scale: float = 1.0
    sinks: bool = True
    relative_rope: bool = False
    kv_cache_dtype: str | None = None
    max_sequence_length: int = 512
    batch_size: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_inference_steps, self.max_sequence_length, self.batch_size) < 1 or self.guidance_scale < 0:
            raise ValueError(
                f"Steps, tokens and the batch size are at least 1 and guidance at least 0, got "
                f"{self.num_inference_steps}, {self.max_sequence_length}, {self.batch_size} and {self.guidance_scale}."
            )


@dataclass(frozen=True)
class JudgedChunk:
    """`segment` counts the story's segments; `seen` is the reading in words."""

    segment: int
    marks: Marks
    seen: str


def judge_stories(
    pipe: LongLivePipeline, stories: Sequence[Story], sampling: Sampling, *, description: str
) -> list[list[JudgedChunk]]:
    """Make all videos and judge their chunks.

    Args:
        stories: Of one outline (the same lengths, the same events).
        description: Of the progress bar.

    Returns:
        For each story, its chunks.

    Raises:
        ValueError: The stories are not of one outline, or there are none.
    """
    _check_stories(stories)
    judged: list[list[JudgedChunk]] = [[] for _ in stories]
    total = len(stories) * stories[0].num_chunks
    with tqdm(total=total, desc=description, unit="chunk") as bar:
        for start in range(0, len(stories), sampling.batch_size):
            batch = stories[start : start + sampling.batch_size]
            before = [_reading_of_image(story) for story in batch]
            for index, frames in enumerate(make_videos(pipe, batch, sampling, first_number=start)):
                number, opens = list(batch[0].chunks())[index]
                for row, story in enumerate(batch):
                    reading = read_chunk(frames[row])
                    judged[start + row].append(_judge(story, number, opens, before[row], reading))
                    before[row] = reading
                bar.update(len(batch))
    return judged


def make_videos(
    pipe: LongLivePipeline, stories: Sequence[Story], sampling: Sampling, *, first_number: int = 0
) -> Iterator[np.ndarray]:
    """The chunks of a batch of videos, `[B, frames, 64, 64, 3]` in [0, 1], with their switches and cuts.

    Args:
        first_number: Number of the first of these stories, of which its noise is drawn.
    """
    _check_stories(stories)
    outline = stories[0].segments
    planned = [number for number, segment in enumerate(outline) if segment.begins == "planned"]
    chunk_size = pipe.transformer.config.chunk_size
    options = {} if sampling.sinks else {"sink_size": 0, "multi_shot_sink": False}
    if len(planned) == 1:
        options["prompt"] = [story.segments[0].caption for story in stories]
    else:
        options["shot_prompts"] = [[story.segments[number].caption for number in planned] for story in stories]
        options["chunks_per_shot"] = [[outline[number].num_chunks for number in planned]] * len(stories)
    if stories[0].image is not None:
        options["image"] = [render(story.image, 1)[0].astype(np.float32) / 255 for story in stories]
    seeds = (sampling.seed * 1_000_003 + first_number + row for row in range(len(stories)))
    with pipe.stream(
        num_frames=pixel_frames(stories[0].num_chunks * chunk_size),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        relative_rope=sampling.relative_rope,
        kv_cache_dtype=sampling.kv_cache_dtype,
        max_sequence_length=sampling.max_sequence_length,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **options,
    ) as session:
        for number, opens in stories[0].chunks():
            begins = outline[number].begins
            if opens and begins != "planned":
                captions = [story.segments[number].caption for story in stories]
                if begins == "switch":
                    session.prompt = captions
                else:
                    session.cut(captions)
            yield next(session).frames


def _check_stories(stories: Sequence[Story]) -> None:
    outlines = {story.outline for story in stories}
    if len(outlines) != 1:
        raise ValueError(f"A batch needs stories of one outline, got {len(outlines)} outlines of {len(stories)}.")
    kinds = [segment.begins for segment in stories[0].segments]
    if kinds[0] != "planned" or kinds != sorted(kinds, key=lambda kind: kind != "planned"):
        raise ValueError(f"Planned segments come first, and there is at least one, got {', '.join(kinds)}.")


def _reading_of_image(story: Story) -> Reading | None:
    """What the picture shows, as the moment before the video: its things are at rest, and begin where they are."""
    return None if story.image is None else read_chunk(np.repeat(render(story.image, 1), 2, axis=0))


def _judge(story: Story, number: int, opens: bool, before: Reading | None, reading: Reading) -> JudgedChunk:
    segment = story.segments[number]
    marks = judge_chunk(reading, segment.expectation)
    begins_shot = opens and (number > 0 and segment.begins != "switch")
    if before is not None and not begins_shot:
        marks[STEADY] = is_steady(before, reading, same_prompt=not opens or number == 0)
    return JudgedChunk(number, marks, str(reading))
