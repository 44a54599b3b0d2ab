"""Text embeddings on the disk: each distinct prompt is encoded once, and kept without the zeros that pad it.

A text encoder is larger than the network that is trained, and a prompt's 512 rows are mostly zeros. With the cache,
training neither holds the one nor stores the others.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from data.cache_files import (
    Settings,
    check_settings,
    claim,
    is_whole,
    load_tensor,
    save_tensor,
)
from tqdm.auto import tqdm


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
    verify: bool = False,
    progress: bool = True,
) -> None:
    """
    Encode those of `prompts` that are not in the cache yet. May be called again, with other prompts too; a build that
    was interrupted goes on. With several ranks, each encodes its part; wait for all before reading.

    Args:
        prompts: Any; repeated ones are encoded once.
        encode: Gives the embeddings [n, max_sequence_length, D] of n prompts, zero beyond the end of each: for example
            `lambda texts: pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=...)[0]`.
            They are kept in the dtype that it gives.
        folder: Of the cache; made if there is none.
        max_sequence_length: Rows of an embedding.
        settings: What embeddings depend on: `data_cache_files.module_settings("text_encoder", encoder)`.
        batch_size: Prompts of one call of `encode`.
        rank, num_ranks: The part of this process.
        verify: Check the content of the files that are already there, not only that they are complete.
        progress: Show a progress bar.

    Raises:
        ValueError: The folder is a cache made with other settings; or `encode` gives another shape than it should, or
            values that are not finite.
    """
    if batch_size < 1 or not 0 <= rank < num_ranks:
        raise ValueError(f"batch_size must be at least 1 and rank in [0, {num_ranks}), got {batch_size} and {rank}")
    folder = Path(folder).expanduser()
    claim(folder, {"text_format": TEXT_FORMAT, "max_sequence_length": max_sequence_length, **settings})
    mine = list(dict.fromkeys(prompts))[rank::num_ranks]
    todo = [prompt for prompt in mine if not is_whole(prompt_path(folder, prompt), verify=verify)]
    with tqdm(total=len(todo), desc="Encoding prompts", disable=not progress or not todo) as bar:
        for start in range(0, len(todo), batch_size):
            texts = todo[start : start + batch_size]
            with torch.no_grad():
                embeds = encode(texts)
            if embeds.ndim != 3 or embeds.shape[:2] != (len(texts), max_sequence_length):
                expected = f"[{len(texts)}, {max_sequence_length}, D]"
                raise ValueError(
                    f"The embeddings of {len(texts)} prompts must be {expected}, got {tuple(embeds.shape)}"
                )
            for text, own in zip(texts, embeds, strict=True):
                if not torch.isfinite(own).all():
                    raise ValueError(f"The embedding of {text!r} has values that are not finite")
                save_tensor(prompt_path(folder, text), own[: _length(own)])
            bar.update(len(texts))


class TextCache:
    """
    Reads what `build_text_cache` wrote.

    Args:
        folder: Of the cache.
        max_sequence_length: Refuse a cache of embeddings of another length; None to take whichever it has.
        settings: Refuse a cache that was made with others; None to take it as it is.

    Raises:
        ValueError: It is no cache, or one of other settings.
    """

    def __init__(
        self, folder: str | os.PathLike, *, max_sequence_length: int | None = None, settings: Settings | None = None
    ) -> None:
        self.folder = Path(folder).expanduser()
        expected: Settings = {"text_format": TEXT_FORMAT, **(settings or {})}
        if max_sequence_length is not None:
            expected["max_sequence_length"] = max_sequence_length
        self.max_sequence_length: int = check_settings(self.folder, expected)["max_sequence_length"]

    def load(self, prompt: str) -> torch.Tensor:
        """
        The embedding [max_sequence_length, D], zero beyond the prompt's end.

        Raises:
            ValueError: The prompt is not in the cache, or its file is damaged.
        """
        path = prompt_path(self.folder, prompt)
        try:
            embeds = load_tensor(path)
        except FileNotFoundError as error:
            raise ValueError(f"The prompt {prompt!r} is not in the cache '{self.folder}'") from error
        padding = self.max_sequence_length - embeds.shape[0]
        return torch.cat([embeds, embeds.new_zeros(padding, embeds.shape[1])])

    def check(self, prompts: Iterable[str]) -> None:
        """
        Raises:
            ValueError: Some are missing; the message says how many, and names the first.
        """
        wanted = set(prompts)
        missing = sorted(prompt for prompt in wanted if not prompt_path(self.folder, prompt).exists())
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(wanted)} prompts are not in the cache '{self.folder}', first {missing[0]!r}"
            )


def prompt_path(folder: Path, prompt: str) -> Path:
    """The file of a prompt's embedding."""
    return folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"


def _length(embeds: torch.Tensor) -> int:
    """Rows up to the last that is not zero; at least 1."""
    rows = embeds.ne(0).any(dim=1).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 1
