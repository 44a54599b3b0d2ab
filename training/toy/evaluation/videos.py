"""Make the videos of stories in batches, chunk by chunk, and hand each chunk to the judge; memory does not grow with
the videos' length.

Every video has noise of its own, drawn from the seed and the index of its story, so that it does not depend on the
size of the batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from evaluation.marks import STEADY, Marks, is_steady, judge_chunk
from evaluation.scenarios import Story
from judge import Reading, read_chunk
from longlive_diffusers import LongLivePipeline, TinyVideoDecoder, pixel_frames
from world import render


@dataclass(frozen=True)
class Sampling:
    """How videos are made.

    Args:
        num_inference_steps: The number of solver steps of each chunk.
        guidance_scale: The scale of classifier-free guidance; 1 is none.
        sinks: Whether to use the pipeline's attention sinks and pinned shot beginnings.
        relative_rope: Whether to count time positions from the cached frames.
        kv_cache_dtype: How keys and values are stored, "nvfp4" or "fp8"; None for the dtype of the network.
        max_sequence_length: The number of tokens that prompts are padded to, as in training.
        batch_size: The number of videos that are made at a time.
        seed: The seed of the noise.
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
    """The marks of a chunk; `segment` is the index of its segment in the story, `seen` the reading in words."""

    segment: int
    marks: Marks
    seen: str


def judge_stories(
    pipe: LongLivePipeline,
    stories: Sequence[Story],
    sampling: Sampling,
    *,
    description: str,
    decoder: TinyVideoDecoder | None = None,
) -> list[list[JudgedChunk]]:
    """Make all videos and judge their chunks.

    Args:
        pipe: The pipeline that makes the videos.
        stories: The stories, all with the same outline (the same lengths, the same events).
        sampling: The settings of how videos are made.
        description: The description of the progress bar.
        decoder: What makes the frames; None for the pipeline's VAE.

    Returns:
        The chunks of each story.

    Raises:
        ValueError: If the stories do not have the same outline, or there are none.
    """
    _check_stories(stories)
    judged: list[list[JudgedChunk]] = [[] for _ in stories]
    total = len(stories) * stories[0].num_chunks
    with tqdm(total=total, desc=description, unit="chunk") as bar:
        for start in range(0, len(stories), sampling.batch_size):
            batch = stories[start : start + sampling.batch_size]
            before = [_reading_of_image(story) for story in batch]
            for chunk, frames in enumerate(make_videos(pipe, batch, sampling, first_index=start, decoder=decoder)):
                segment, opens = list(batch[0].chunks())[chunk]
                for index, story in enumerate(batch):
                    reading = read_chunk(frames[index])
                    judged[start + index].append(_judge(story, segment, opens, before[index], reading))
                    before[index] = reading
                bar.update(len(batch))
    return judged


def make_videos(
    pipe: LongLivePipeline,
    stories: Sequence[Story],
    sampling: Sampling,
    *,
    first_index: int = 0,
    decoder: TinyVideoDecoder | None = None,
) -> Iterator[np.ndarray]:
    """Yield the chunks of a batch of videos, `[B, frames, 64, 64, 3]` in [0, 1], with their switches and cuts.

    Args:
        pipe: The pipeline that makes the videos.
        stories: The stories, all with the same outline.
        sampling: The settings of how videos are made.
        first_index: The index of the first of these stories among all, from which the noise is drawn.
        decoder: What makes the frames; None for the pipeline's VAE.
    """
    _check_stories(stories)
    outline = stories[0].segments
    planned = [index for index, segment in enumerate(outline) if segment.begins == "planned"]
    chunk_size = pipe.transformer.config.chunk_size
    options: dict[str, Any] = {} if sampling.sinks else {"sink_size": 0, "multi_shot_sink": False}
    if decoder is not None:
        options["decoder"] = decoder
    if len(planned) == 1:
        options["prompt"] = [story.segments[0].caption for story in stories]
    else:
        options["shot_prompts"] = [[story.segments[index].caption for index in planned] for story in stories]
        options["chunks_per_shot"] = [[outline[index].num_chunks for index in planned]] * len(stories)
    if stories[0].image is not None:
        options["image"] = [render(story.image, 1)[0].astype(np.float32) / 255 for story in stories]
    seeds = (sampling.seed * 1_000_003 + first_index + index for index in range(len(stories)))
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
        for index, opens in stories[0].chunks():
            begins = outline[index].begins
            if opens and begins != "planned":
                captions = [story.segments[index].caption for story in stories]
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
    """Return what the image shows, as if it were a chunk before the video: its things stand still where they begin."""
    return None if story.image is None else read_chunk(np.repeat(render(story.image, 1), 2, axis=0))


def _judge(story: Story, chunk_index: int, opens: bool, before: Reading | None, reading: Reading) -> JudgedChunk:
    segment = story.segments[chunk_index]
    marks = judge_chunk(reading, segment.expectation)
    begins_shot = opens and (chunk_index > 0 and segment.begins != "switch")
    if before is not None and not begins_shot:
        marks[STEADY] = is_steady(before, reading, same_prompt=not opens or chunk_index == 0)
    return JudgedChunk(chunk_index, marks, str(reading))
