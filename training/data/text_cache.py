"""Text embeddings on disk: each distinct prompt is encoded once, and stored without the zeros that pad it.

A text encoder is larger than the network that is trained, and the embeddings of a prompt, padded to 512 tokens, are
mostly zeros. With the cache, training does not hold the text encoder in memory, and the zeros are not stored.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from data.cache_files import (
    TENSOR_SUFFIX,
    Settings,
    check_cache,
    check_settings,
    create_cache,
    damaged,
    is_complete,
    load_tensor,
    save_tensor,
    whole_number,
)
from longlive_diffusers.pipelines.prompt_cleaning import clean_prompt
from longlive_diffusers.user_path import user_path


TEXT_FORMAT = 1


def build_text_cache(
    prompts: Iterable[str],
    encode: Callable[[list[str]], torch.Tensor],
    folder: str | os.PathLike,
    *,
    max_sequence_length: int,
    settings: Settings,
    batch_size: int = 8,
    rank: int = 0,
    num_ranks: int = 1,
    progress: bool = True,
) -> None:
    """
    Encode the prompts that are not in the cache yet. This may be called again, also with other prompts; a build that
    was interrupted is resumed. With several ranks, each encodes its part; wait for all before reading.

    Args:
        prompts: The prompts; repeated ones are encoded once.
        encode: A function that returns the embeddings `[n, max_sequence_length, D]` of n prompts, zero beyond the end
            of each: for example `lambda prompts: pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]`.
            They are stored in the dtype that it returns.
        folder: The folder of the cache; created if there is none.
        max_sequence_length: The number of tokens that prompts are padded to.
        settings: What embeddings depend on: `cache_files.module_settings("text_encoder", encoder)`.
        batch_size: The number of prompts of one call of `encode`.
        rank, num_ranks: The index of this process, and the number of processes that share the work.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the folder is a cache made with other settings; or `encode` returns another shape than it
            should, or values that are not finite.
    """
    if batch_size < 1 or not 0 <= rank < num_ranks:
        raise ValueError(f"batch_size must be at least 1 and rank in [0, {num_ranks}), got {batch_size} and {rank}")
    folder = user_path(folder)
    settings = text_settings(max_sequence_length, settings)
    check_cache(folder, settings)
    todo = missing_prompts(prompts, folder, rank=rank, num_ranks=num_ranks)
    with tqdm(total=len(todo), desc="Encoding prompts", disable=not progress or not todo) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            with torch.no_grad():
                embeds = encode(batch)
            if embeds.ndim != 3 or embeds.shape[:2] != (len(batch), max_sequence_length):
                expected = f"[{len(batch)}, {max_sequence_length}, D]"
                raise ValueError(
                    f"The embeddings of {len(batch)} prompts must be {expected}, got {tuple(embeds.shape)}"
                )
            for prompt, own in zip(batch, embeds, strict=True):
                if not torch.isfinite(own).all():
                    raise ValueError(f"The embedding of {prompt!r} has values that are not finite")
                create_cache(folder, settings)
                save_tensor(prompt_path(folder, prompt), own[: _length(own)])
            bar.update(len(batch))


def text_settings(max_sequence_length: int, settings: Settings) -> Settings:
    """Return all settings of a text cache, where `settings` are those of the text encoder."""
    return {"text_format": TEXT_FORMAT, "max_sequence_length": max_sequence_length, **settings}


def missing_prompts(prompts: Iterable[str], folder: Path, *, rank: int = 0, num_ranks: int = 1) -> list[str]:
    """Return the prompts of this rank's part that are not in the cache, each once. Which part is whose does not depend
    on what is in the cache."""
    paths = {prompt_path(folder, prompt): prompt for prompt in prompts}
    return [prompt for path, prompt in list(paths.items())[rank::num_ranks] if not is_complete(path)]


class TextCache:
    """
    Reads what `build_text_cache` wrote.

    Args:
        folder: The folder of the cache.
        max_sequence_length: The number of padded tokens that the cache must have been built for; None for any.

    Raises:
        ValueError: If it is not a cache, or one with other settings.
    """

    def __init__(self, folder: str | os.PathLike, *, max_sequence_length: int | None = None) -> None:
        self.folder = user_path(folder)
        expected: Settings = {"text_format": TEXT_FORMAT}
        if max_sequence_length is not None:
            expected["max_sequence_length"] = max_sequence_length
        found = check_settings(self.folder, expected)
        self.max_sequence_length = whole_number(self.folder, found, "max_sequence_length")

    def load(self, prompt: str) -> torch.Tensor:
        """
        Return the embeddings of a prompt, `[max_sequence_length, D]`, zero beyond the prompt's end.

        Raises:
            ValueError: If the prompt is not in the cache, or its file is damaged.
        """
        path = prompt_path(self.folder, prompt)
        try:
            embeds = load_tensor(path)
        except FileNotFoundError as error:
            raise ValueError(f"The prompt {prompt!r} is not in the cache '{self.folder}'") from error
        if embeds.ndim != 2 or len(embeds) > self.max_sequence_length or not embeds.is_floating_point():
            found = f"{embeds.dtype} {tuple(embeds.shape)}"
            raise damaged(path, f"embeddings are [up to {self.max_sequence_length}, D], but it holds {found}")
        padding = self.max_sequence_length - embeds.shape[0]
        return torch.cat([embeds, embeds.new_zeros(padding, embeds.shape[1])])

    def check(self, prompts: Iterable[str]) -> None:
        """
        Check that all of the prompts are in the cache.

        Raises:
            ValueError: If some are missing; the message says how many, and names the first.
        """
        distinct = set(prompts)
        missing = sorted(prompt for prompt in distinct if not prompt_path(self.folder, prompt).exists())
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(distinct)} prompts are not in the cache '{self.folder}', first {missing[0]!r}"
            )


def prompt_path(folder: Path, prompt: str) -> Path:
    """Return the file of a prompt's embeddings. It is named after the text that the tokenizer is given, so prompts
    that are cleaned to the same text share a file, and a change of the cleaning leads to another file."""
    return folder / f"{hashlib.sha256(clean_prompt(prompt).encode()).hexdigest()[:32]}{TENSOR_SUFFIX}"


def _length(embeds: torch.Tensor) -> int:
    """Return the number of tokens up to the last one that is not zero; at least 1."""
    tokens = embeds.ne(0).any(dim=1).nonzero()
    return int(tokens[-1]) + 1 if len(tokens) else 1
