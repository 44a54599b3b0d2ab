"""A pipeline without a text encoder: its prompts are looked up in the text cache of the run."""

import re
from collections.abc import Iterable
from typing import Protocol

import torch

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.pipelines.shots import ShotPlan


SHOT_BREAK = re.compile(r"(?<= )\|(?= )")  # two of them may share a blank: "a | | b" has three shots


class Texts(Protocol):
    """What is needed of a text cache: `load` returns the embeddings of a prompt, `[max_sequence_length, D]`."""

    max_sequence_length: int

    def load(self, prompt: str) -> torch.Tensor: ...


class CachedPromptsPipeline(LongLivePipeline):
    """A LongLive pipeline whose `texts` has the embeddings of all prompts that it is given, and of the empty one."""

    texts: Texts

    def _embed_prompts(
        self,
        prompts: list[str],
        max_sequence_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Look up n prompts, `[n, L, D]`; L is that of the cache."""
        embeds = torch.stack([self.texts.load(prompt) for prompt in prompts])
        return embeds.to(device or self.transformer.device, dtype or self.transformer.dtype)


def split_shots(prompt: str) -> list[str]:
    """Return the prompt of each shot of a video; ' | ' separates them."""
    return [shot.strip() for shot in SHOT_BREAK.split(prompt)]


def texts_of(prompts: Iterable[str], scene_cut_prefix: str) -> list[str]:
    """Return all texts that videos of these prompts are conditioned on."""
    # Two chunks a shot, the first of which is conditioned on another text than all others.
    plans = [ShotPlan.from_prompts(split_shots(prompt), 2, None) for prompt in prompts]
    return [text for plan in plans for text in plan.conditionings(scene_cut_prefix, None)]
