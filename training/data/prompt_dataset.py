"""Prompts in the form that distillation takes: the embeddings and the shot of every chunk of a video that the model
makes itself, and, if it continues from images, the latent of its first frame.

A chunk is conditioned exactly as in generation (`longlive_diffusers/pipelines/shots.py`). Each keeps its own prompt,
also before a prompt switch: there, a roll-out does what a session does. (Teacher forcing shows the history of a switch
under the new prompt instead, see `conditioning.py`.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.utils.data import Dataset

from data.latent_cache import LatentDataset
from data.prompt_list import PromptSample
from data.text_cache import TextCache
from longlive_diffusers import ShotPlan


@dataclass(frozen=True)
class ChunkTexts:
    """
    Args:
        prompts: The text that each chunk is conditioned on.
        shot_index: The index of each chunk's shot, from 0.
        cuts: Whether each chunk opens a shot other than the first.
        switches: Whether each chunk is the first with a new prompt within its shot.
    """

    prompts: tuple[str, ...]
    shot_index: tuple[int, ...]
    cuts: tuple[bool, ...]
    switches: tuple[bool, ...]


def plan_shots(sample: PromptSample, num_chunks: int) -> ShotPlan:
    """
    Return the shots of a video, as in generation: without durations, chunks are spread evenly and the first shots take
    the remainder; with them, the last shot goes on to the end. Shots for which no chunk is left are dropped.

    Args:
        sample: The shots of the video.
        num_chunks: Its length in chunks.

    Raises:
        ValueError: If there is no chunk, or durations are not whole numbers of at least 1 for all shots.
    """
    if num_chunks < 1:
        raise ValueError(f"A video has at least 1 chunk, got {num_chunks}")
    durations = [shot.chunks for shot in sample.shots if shot.chunks is not None] or None
    evenly = ShotPlan.from_prompts([shot.prompt for shot in sample.shots], durations, num_chunks)
    shots = []
    for planned, shot in zip(evenly.shots, sample.shots, strict=False):
        opens = shot.cut or not shots
        shots.append(replace(planned, index=shots[-1].index + opens if shots else 0, opens=opens))
    return ShotPlan(shots)


def plan_chunks(sample: PromptSample, num_chunks: int, scene_cut_prefix: str) -> ChunkTexts:
    """
    Return what conditions the chunks of a video.

    Args:
        sample, num_chunks: See [`plan_shots`], also for its errors.
        scene_cut_prefix: The text put before the prompt of the first chunk of every shot but the first.
    """
    plan = plan_shots(sample, num_chunks)
    chunks = [plan.chunk(index) for index in range(num_chunks)]
    switches = [
        chunk.shot_index == before.shot_index and chunk.prompt != before.prompt for before, chunk in pairwise(chunks)
    ]
    return ChunkTexts(
        prompts=tuple(chunk.conditioning(scene_cut_prefix) for chunk in chunks),
        shot_index=tuple(chunk.shot_index for chunk in chunks),
        cuts=tuple(chunk.cuts for chunk in chunks),
        switches=(False, *switches),
    )


def distinct_prompts(plans: Iterable[ChunkTexts]) -> list[str]:
    """Return every text that a chunk of any video is conditioned on, once each, in order of appearance."""
    return list(dict.fromkeys(prompt for plan in plans for prompt in plan.prompts))


class PromptDataset(Dataset):
    """
    The prompts of videos, each `num_chunks` chunks long.

    An item is a dict:
        prompt_embeds: The embeddings of each chunk's prompt, `[chunks, L, D]`, zero beyond each prompt's end; in the
            dtype of the text cache.
        shot_index: The index of each chunk's shot, int64 `[chunks]`.
        cuts: Which chunks open a shot other than the first, bool `[chunks]`.
        switches: Which chunks are the first with a new prompt within their shot, bool `[chunks]`.
        first_frame: The normalized latent of the video's first frame, float32 `[C, 1, h, w]`; only if there are
            `first_frames`.

    Args:
        samples: The shots of each video.
        texts: The embeddings of all `distinct_prompts()`.
        num_chunks: The number of chunks of each video.
        scene_cut_prefix: The text put before the prompt of the first chunk of every shot but the first.
        first_frames: The latents of the first frames of the same videos, in the same order; None to make videos from
            text alone.

    Raises:
        ValueError: If there are no samples, another number of first frames, or first frames of more than one latent
            frame; or prompts are missing in the cache.
    """

    def __init__(
        self,
        samples: Sequence[PromptSample],
        texts: TextCache,
        num_chunks: int,
        scene_cut_prefix: str,
        first_frames: LatentDataset | None = None,
    ) -> None:
        if not samples:
            raise ValueError("There must be at least one sample, got none")
        if first_frames is not None and len(first_frames) != len(samples):
            raise ValueError(f"There are {len(samples)} samples, but {len(first_frames)} first frames")
        if first_frames is not None and first_frames.num_latent_frames != 1:
            raise ValueError(f"A first frame has 1 latent frame, got {first_frames.num_latent_frames}")
        self.samples, self.texts, self.first_frames = tuple(samples), texts, first_frames
        self.num_chunks = num_chunks
        self._plans = [plan_chunks(sample, num_chunks, scene_cut_prefix) for sample in self.samples]
        texts.check(self.distinct_prompts())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Raises:
            ValueError: If a file of a cache is damaged.
        """
        plan = self._plans[index]
        embeds = {prompt: self.texts.load(prompt) for prompt in dict.fromkeys(plan.prompts)}
        item = {
            "prompt_embeds": torch.stack([embeds[prompt] for prompt in plan.prompts]),
            "shot_index": torch.tensor(plan.shot_index, dtype=torch.int64),
            "cuts": torch.tensor(plan.cuts, dtype=torch.bool),
            "switches": torch.tensor(plan.switches, dtype=torch.bool),
        }
        if self.first_frames is not None:
            item["first_frame"] = self.first_frames.latents(index)
        return item

    @property
    def names(self) -> list[str]:
        """The names of the samples, in order."""
        return [sample.name for sample in self.samples]

    @property
    def cut_short(self) -> list[str]:
        """The names of the samples whose last shot is not reached."""
        return [
            sample.name
            for sample in self.samples
            if plan_shots(sample, self.num_chunks).num_reached(self.num_chunks) < len(sample.shots)
        ]

    @property
    def has_switches(self) -> bool:
        """Whether any prompt changes within a shot."""
        return any(any(plan.switches) for plan in self._plans)

    def distinct_prompts(self) -> list[str]:
        """Return every text that a chunk of any sample is conditioned on, once each, in order of appearance."""
        return distinct_prompts(self._plans)
