"""The text encoder of a run, which only those processes load that have prompts to encode.

It is larger than the network that is trained. A run that finds all of its prompts in the text cache needs only to know
that the cache was made with this text encoder. That is a matter of the weights, which have to be read to tell; so the
cache also remembers which files were read, and as long as they are the same files, they are not read again.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from data.cache_files import (
    SETTINGS_FILE,
    DamagedFileError,
    Settings,
    check_cache,
    make_folder,
    module_settings,
    read_cache_json,
    read_settings,
    write_json,
)
from data.text_cache import build_text_cache, missing_prompts, text_settings
from longlive_diffusers import LongLivePipeline
from run.arguments import ModelArguments


KNOWN_FILES = "known_encoders.json"
LONGEST_PROMPT = 512
"""The number of tokens that prompts are padded to in generation, unless something else is asked for."""

logger = logging.getLogger(__name__)


def prompt_length(requested: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Return the number of tokens that prompts are padded or cut to: as in generation if none is requested.

    Raises:
        ValueError: If the tokenizer takes fewer than are requested.
    """
    limit = tokenizer.model_max_length
    if requested is None:
        return min(LONGEST_PROMPT, limit)
    if requested > limit:
        raise ValueError(f"--max_sequence_length {requested}: the tokenizer of the model takes at most {limit} tokens")
    return requested


@dataclass(frozen=True)
class TextEncoder:
    """
    A text encoder that is loaded when it is first needed, and stays loaded for as long as this object.

    Args:
        source: The folder or Hub repository of its pipeline.
        revision, variant: Which of the repository's files.
        dtype: The dtype that it computes in.
        device: The device that it computes on.
        max_sequence_length: The number of tokens that prompts are padded or cut to.
    """

    source: str
    revision: str | None
    variant: str | None
    dtype: torch.dtype
    device: torch.device
    max_sequence_length: int

    @cached_property
    def pipe(self) -> LongLivePipeline:
        """The text encoder with its tokenizer."""
        pipe = LongLivePipeline.from_pretrained(
            self.source,
            transformer=None,
            vae=None,
            dtype=self.dtype,
            revision=self.revision,
            variant=self.variant,
        )
        pipe.text_encoder.requires_grad_(False).eval()
        return pipe

    @property
    def is_there(self) -> bool:
        """Whether the pipeline has a text encoder, as far as can be told without the Hub."""
        return not Path(self.source).is_dir() or (Path(self.source) / "text_encoder").is_dir()

    @cached_property
    def settings(self) -> Settings:
        """What its embeddings depend on; this reads all of its weights."""
        return module_settings("text_encoder", self.pipe.text_encoder)

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Return the embeddings of n prompts, `[n, max_sequence_length, D]`, zero beyond the end of each."""
        self.pipe.text_encoder.to(self.device)
        return self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )[0]

    def files(self) -> str:
        """Return a digest of where the files are and when they were written; of a repository on the Hub, of its
        commit.

        Raises:
            ValueError: If the pipeline is a folder, and has no text encoder.
        """
        folder = Path(self.source) / "text_encoder"
        if not self.is_there:
            raise ValueError(f"'{self.source}' has no folder text_encoder/, with which prompts are encoded")
        if folder.is_dir():
            stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
            described = [str(folder.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
        else:  # the pipeline was loaded from there, so that this much of it is on this machine
            snapshot = snapshot_download(
                self.source, revision=self.revision, allow_patterns="model_index.json", local_files_only=True
            )
            described = [self.source, Path(snapshot).name]
        return hashlib.sha256(json.dumps([*described, self.variant, str(self.dtype)]).encode()).hexdigest()


def text_encoder_of(
    model: ModelArguments,
    max_sequence_length: int | None,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
) -> TextEncoder:
    """
    Return the text encoder of the model that a run starts from, not loaded yet; it computes in bfloat16 where the
    network does.

    Raises:
        ValueError: As [`prompt_length`].
    """
    return TextEncoder(
        model.pretrained_model_name_or_path,
        model.revision,
        model.variant,
        dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32,
        device=accelerator.device,
        max_sequence_length=prompt_length(max_sequence_length, tokenizer),
    )


def encode_missing(accelerator: Accelerator, encoder: TextEncoder, prompts: Sequence[str], folder: Path) -> None:
    """
    Encode the prompts that are not in the text cache yet; each process encodes its part. Every process has to call
    this; wait for all before reading.

    Raises:
        ValueError: If the folder is a cache made with another text encoder, or other settings.
    """
    if accelerator.is_main_process:
        files = encoder.files()
        if not _is_known(files, folder):
            settings = text_settings(encoder.max_sequence_length, encoder.settings)
            check_cache(folder, settings)
            _remember(files, settings, folder)
    accelerator.wait_for_everyone()
    part = {"rank": accelerator.process_index, "num_ranks": accelerator.num_processes}
    if missing_prompts(prompts, folder, **part):  # only then is the encoder loaded
        build_text_cache(
            prompts,
            encoder.encode,
            folder,
            max_sequence_length=encoder.max_sequence_length,
            settings=encoder.settings,
            progress=accelerator.is_main_process,
            **part,
        )


def _is_known(files: str, folder: Path) -> bool:
    """Whether the cache was made with the text encoder in files of this digest, so far as it is remembered."""
    is_cache = (folder / SETTINGS_FILE).exists()
    return is_cache and _known_files(folder).get(files) == _digest(read_settings(folder))


def _remember(files: str, settings: Settings, folder: Path) -> None:
    make_folder(folder)
    write_json(folder / KNOWN_FILES, {**_known_files(folder), files: _digest(settings)})


def _known_files(folder: Path) -> dict:
    """Return the digests of settings by those of files. What is damaged is forgotten, and the files are read again."""
    path = folder / KNOWN_FILES
    try:
        return read_cache_json(path) if path.exists() else {}
    except DamagedFileError as error:
        logger.warning("%s, and is made again", error)
        return {}


def _digest(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
