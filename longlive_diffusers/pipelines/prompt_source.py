"""PromptSource: the prompt embeddings of every chunk, from shot plans that can be redirected while a video is made."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers.utils import logging

from ..wording import counted
from .blending import Blend, check_blend
from .prompt_cleaning import shortened
from .shots import ChunkPrompt, ShotPlan


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Redirection:
    """Prompts that replace what was planned, one for each sample, as a new shot (`cut`) or within the current one: at
    once, or by a blend of so many `chunks`."""

    prompts: list[str]
    cut: bool
    chunks: int = 1
    interpolation: str = "linear"

    @property
    def needs_new_frames(self) -> bool:
        """Whether this is seen only in frames that are made, not in those of a video that is continued."""
        return self.cut or self.chunks > 1


class PromptSource:
    """
    Gives each chunk its prompts and their embeddings, `[B, L, D]`: the same tensor for as long as no sample's text
    changes and no blend is under way, by which the transformer recognizes that its cached text keys and values are
    still valid.

    Args:
        plans: A shot plan for each sample; None where `prompt_embeds` are given.
        encode: Encodes n texts to embeddings `[n, L, D]`.
        prompt_embeds: The embeddings `[B, L, D]` for the whole video, or None.
        negative_embeds: The embeddings `[B, L, D]` of the negative prompt, with guidance.
        batch_size: The number of samples, B.
        scene_cut_prefix: Put before the prompt of the first chunk of every shot but the first.
        num_new_chunks: The length of the video in chunks, so that only texts that will be used are encoded; None for
            an endless video.
        check_can_encode: Raises a ValueError if so many texts cannot be encoded, because what does so is missing; None
            where nobody asks for texts.
        continues: Whether the video continues another one, so that its first chunk can begin with a cut.
    """

    def __init__(
        self,
        plans: list[ShotPlan] | None,
        encode: Callable[[list[str]], torch.Tensor],
        *,
        prompt_embeds: torch.Tensor | None = None,
        negative_embeds: torch.Tensor | None,
        batch_size: int,
        scene_cut_prefix: str,
        num_new_chunks: int | None,
        check_can_encode: Callable[[int], None] | None = None,
        continues: bool = False,
    ):
        self.negative_embeds, self.batch_size = negative_embeds, batch_size
        self._plans, self._encode, self._prefix = plans, encode, scene_cut_prefix
        self._num_new_chunks, self._continues, self._check_can_encode = num_new_chunks, continues, check_can_encode
        self._texts: tuple[str, ...] | None = None  # of each sample, encoded in `_embeds`
        self._embeds = prompt_embeds
        self._is_replaced = False  # whether a callback has put others in their place
        self._encoded: dict[str, torch.Tensor] = {}
        self._blend: Blend | None = None  # if one is under way
        self._next_chunk = 0
        self._redirection: Redirection | None = None
        self._lock = threading.Lock()  # redirections may come from another thread than the one that denoises
        self._encode_upcoming()

    @property
    def num_tokens(self) -> int:
        """The number of tokens of a prompt's embeddings, L."""
        embeds = self._embeds if self._embeds is not None else next(iter(self._encoded.values()))
        return embeds.shape[-2]

    def take_redirection(self, index: int) -> Redirection | None:
        """Return, once, the change of prompts that chunk `index` begins with, for [`advance`]."""
        with self._lock:
            pending = self._redirection
            self._next_chunk = max(index + 1, 0)
            if pending is None or (index < 0 and pending.needs_new_frames):
                return None
            self._redirection = None
            return pending

    def advance(self, index: int, redirection: Redirection | None) -> tuple[list[ChunkPrompt], torch.Tensor, bool]:
        """
        Begin chunk `index` of the new video (negative: of the video that is continued, under the first prompts).

        Args:
            index: The index of the chunk.
            redirection: What [`take_redirection`] returned for it.

        Returns:
            Each sample's prompt, the embeddings, and whether they changed within a shot, by a switch or a blend.
        """
        switched = False
        if redirection is not None:
            self._redirect(redirection, max(index, 0))
            switched = not redirection.cut
        if self._plans is None:
            assert self._embeds is not None  # where there are no plans, embeddings were given
            return [ChunkPrompt(None, 0, False)] * self.batch_size, self._embeds, False
        prompts = [plan.chunk(max(index, 0)) for plan in self._plans]
        texts = tuple(prompt.conditioning(self._prefix) for prompt in prompts)
        if self._blend is not None:
            self._texts, self._embeds, switched = texts, self._blend.next(), True
            self._is_replaced = False
            if self._blend.is_over:
                self._blend = None
        elif texts != self._texts or self._embeds is None:
            self._texts, self._is_replaced = texts, False
            self._embeds = torch.stack([self._encoded[text] for text in texts])
        return prompts, self._embeds, switched

    def redirect(self, prompt: str | list[str], *, cut: bool, chunks: int = 1, interpolation: str = "linear") -> None:
        """Use `prompt` from the next chunk on, one for all samples or a list of one for each, within the current shot
        or as a new one (`cut`), or move to it over the next `chunks` chunks. A cut that is still to come remains one,
        to this prompt: a new shot has nothing to move from.

        Raises:
            ValueError: If `prompt` is of another type, there are not as many prompts as samples, the number of chunks
                or the interpolation is none of those that there are, or there is nothing to encode prompts with.
        """
        check_blend(chunks, interpolation)
        prompts = [prompt] * self.batch_size if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"A prompt must be a string or a list of {self.batch_size} strings, got {prompt!r}.")
        if len(prompts) != self.batch_size:
            raise ValueError(
                f"Got {counted(len(prompts), 'prompt')} for a batch of {counted(self.batch_size, 'video')}."
            )
        if self._check_can_encode is not None:
            self._check_can_encode(len(prompts))
        with self._lock:
            cut = cut or (self._redirection is not None and self._redirection.cut)
            self._redirection = Redirection(list(prompts), cut, 1 if cut else chunks, interpolation)

    def upcoming(self) -> list[str | None]:
        """Return the prompts of the next chunk."""
        with self._lock:
            if self._redirection is not None:
                return list(self._redirection.prompts)
            if self._plans is None:
                return [None] * self.batch_size
            return [plan.chunk(self._next_chunk).prompt for plan in self._plans]

    def warn_of_unused(self) -> None:
        """Warn of a prompt that was set when the last chunk had begun already; called at the end of the video."""
        with self._lock:
            if self._redirection is not None:
                prompts = ", ".join(map(shortened, dict.fromkeys(self._redirection.prompts)))
                logger.warning(f"The video ended before its prompt could change: {prompts} came after its last chunk.")

    def replace_embeds(self, prompt_embeds: torch.Tensor) -> None:
        """Use other embeddings until the text changes; for callbacks."""
        self._embeds, self._is_replaced = prompt_embeds, True

    def _redirect(self, redirection: Redirection, index: int) -> None:
        texts, embeds = self._texts_to_go_on_with(index), () if self._embeds is None else self._embeds
        plans = self._plans or [ShotPlan.from_prompts([""], None, None)] * self.batch_size
        self._plans = [
            plan.redirected(index, prompt, cut=redirection.cut, continues=self._continues)
            for plan, prompt in zip(plans, redirection.prompts, strict=True)
        ]
        if redirection.chunks == 1:
            if self._blend is not None or self._is_replaced:  # also where the text is the one that there is
                self._texts = None
            self._blend = None
            self._encode_upcoming()
            return
        self._encode_upcoming(text for text in texts if text is not None)
        start = [self._encoded[text] if text is not None else embeds[sample] for sample, text in enumerate(texts)]
        end = [self._encoded[prompt] for prompt in redirection.prompts]
        self._blend = Blend(torch.stack(start), torch.stack(end), redirection.chunks, redirection.interpolation)

    def _texts_to_go_on_with(self, index: int) -> list[str | None]:
        """Return what each sample's chunk `index` would show if the prompts before it just went on; None where
        `_embeds` are those of that. After the chunk of a cut they are not: they say that the scene changes."""
        if self._plans is None:
            return [None] * self.batch_size
        shown = [plan.chunk(max(index - 1, 0)).prompt or "" for plan in self._plans]
        encoded = self._texts or [None] * self.batch_size
        return [None if text == own else text for text, own in zip(shown, encoded, strict=True)]

    def _encode_upcoming(self, also: Iterable[str] = ()) -> None:
        """Encode, in one batch, the texts that are still to come and others that are needed, if they are not encoded
        yet; forget all others."""
        texts = dict.fromkeys(also)
        for plan in self._plans or ():
            texts.update(dict.fromkeys(plan.conditionings(self._prefix, self._num_new_chunks)))
        missing = [text for text in texts if text not in self._encoded]
        if missing:
            self._encoded.update(zip(missing, self._encode(missing), strict=True))
        self._encoded = {text: self._encoded[text] for text in texts}
