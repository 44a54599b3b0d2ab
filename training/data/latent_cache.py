"""The latents of a training set on disk: every video is decoded and encoded once, not once per epoch.

    FOLDER/settings.json            what all latents depend on: sizes, the VAE
    FOLDER/samples.json             the samples' names, prompts, shots and which chunks bear loss (`sample_list.py`)
    FOLDER/<digest>.safetensors     normalized latents [C, F, h, w] of a sample, named after the clips it is made of

When a training set changes, the samples whose clips changed are encoded, and no others. With the text cache beside
it (`text_cache.py`), training needs neither the videos nor the VAE nor the text encoder. Each sample is a file of its
own: a build that was killed continues with the next sample, ranks share the work without communicating, and reading a
sample takes a fraction of a millisecond plus the time for its bytes. Samples that were read stay in memory up to a
limit, so a small training set is read once.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from data.cache_files import (
    TENSOR_SUFFIX,
    Settings,
    check_cache,
    check_settings,
    compare_settings,
    create_cache,
    damaged,
    is_complete,
    load_tensor,
    make_folder,
    module_settings,
    save_tensor,
    whole_number,
)
from data.clips import VideoDataset
from data.sample_list import SampleList, describe, read_samples, write_samples
from data.text_cache import TextCache
from longlive_diffusers.models.streaming_vae import encode_video
from longlive_diffusers.user_path import user_path


LATENT_FORMAT = 2
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


def cache_settings(dataset: VideoDataset, vae: AutoencoderKLWan, dtype: torch.dtype = torch.float32) -> Settings:
    """Return what all latents of a dataset depend on: the format, the sizes, the VAE's configuration and weights."""
    return {
        "latent_format": LATENT_FORMAT,
        "latent_dtype": str(dtype),
        **dataset.pixel_settings(),
        **module_settings("vae", vae),
    }


def build_latent_cache(
    dataset: VideoDataset,
    vae: AutoencoderKLWan,
    folder: str | os.PathLike,
    *,
    device: torch.device | str,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    progress: bool = True,
) -> None:
    """
    Encode the samples that are not in the cache yet, and list all of the dataset in it. A build that was interrupted
    is resumed; damaged files are named in a warning and encoded again. With several ranks, each encodes its part; wait
    for all before reading.

    Args:
        dataset: The videos; the same in every rank.
        vae: The VAE; it is moved to `device`, and runs in the dtype it has.
        folder: The folder of the cache; created if there is none.
        device: The device to encode on.
        batch_size: The number of videos that are encoded at a time. (Another one may change the last bit of a latent.)
        dtype: The dtype of the latents on disk. bfloat16 halves the cache and rounds latents to 3 significant digits.
        num_workers: The number of processes that decode videos meanwhile.
        rank, num_ranks: The index of this process, and the number of processes that share the work.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the folder is a cache made with other settings (they are named); the VAE does not take the
            size of the frames; a video can no longer be read; or its latents are not finite.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, STORED_DTYPES))}, got {dtype}")
    if batch_size < 1 or not 0 <= rank < num_ranks:
        raise ValueError(f"batch_size must be at least 1 and rank in [0, {num_ranks}), got {batch_size} and {rank}")
    scale = vae.config.scale_factor_spatial
    if dataset.height % scale or dataset.width % scale:
        raise ValueError(f"The VAE takes multiples of {scale} pixels, but videos are {dataset.height}x{dataset.width}")
    folder = user_path(folder)
    settings = cache_settings(dataset, vae, dtype)
    check_cache(folder, settings)
    make_folder(folder)
    samples = describe(dataset)
    write_samples(folder, samples)

    index_of = {_latents_path(folder, samples, i): i for i in range(len(dataset))}  # samples may have the same clips
    todo = {path: i for path, i in list(index_of.items())[rank::num_ranks] if not is_complete(path)}
    if rank == 0:
        _report_unused(folder, samples)
    vae = vae.to(device)
    subset = Subset(dataset, list(todo.values()))
    loader = DataLoader(subset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    paths = iter(todo)
    with tqdm(total=len(todo), desc="Encoding videos", disable=not progress or not todo) as bar:
        for batch in loader:
            for name, latents in zip(batch["name"], encode_video(vae, batch["pixels"], device), strict=True):
                if not torch.isfinite(latents).all():
                    raise ValueError(f"The latents of '{name}' have values that are not finite")
                create_cache(folder, settings)
                save_tensor(next(paths), latents.to(dtype))
                bar.update()


class LatentDataset(Dataset):
    """
    A training set that was encoded by `build_latent_cache` and `build_text_cache`; the videos are not needed.

    An item is a dict:
        latents: The normalized latents, float32 `[C, F, h, w]`.
        prompt_embeds: The embeddings of each chunk's prompt, `[chunks, L, D]`, zero beyond each prompt's end; in the
            dtype of the text cache.
        shot_index: The index of each chunk's shot, int64 `[chunks]`.
        loss_mask: Which chunks bear loss, bool `[chunks]`.
        name: The name of the sample.

    Args:
        folder: The folder of the latents.
        text_folder: The folder of the text embeddings.
        max_sequence_length: The length L that the text cache must have; None for any.
        settings: The settings that the cache must have been made with, for example `{"height": 704}`; None for any.
            (`build_latent_cache` checks all of them.)
        samples: The samples of the dataset that was encoded; None for those that the cache was last built for.
        memory_limit: The number of bytes that each reading process keeps in memory of what it has read.

    Raises:
        ValueError: If a folder is not a cache, or one with other settings, or not complete (the message says what is
            missing), or damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        text_folder: str | os.PathLike,
        max_sequence_length: int | None = None,
        *,
        settings: Settings | None = None,
        samples: SampleList | None = None,
        memory_limit: int = 2**30,
    ) -> None:
        self.folder = user_path(folder)
        latent_settings = check_settings(self.folder, {"latent_format": LATENT_FORMAT})
        self.num_latent_frames = whole_number(self.folder, latent_settings, "num_latent_frames")
        """The number of latent frames of a sample."""
        self.chunk_size = whole_number(self.folder, latent_settings, "chunk_size")
        """The number of latent frames of a chunk."""
        self._list = samples or read_samples(self.folder, self.num_latent_frames // self.chunk_size)
        compare_settings(self.folder, {**latent_settings, **self._list.settings}, settings or {})
        self.text = TextCache(text_folder, max_sequence_length=max_sequence_length)
        self.memory_limit = memory_limit
        self._kept: dict[Path | str, torch.Tensor] = {}
        self._kept_bytes = 0
        existing = {path.name for path in self.folder.iterdir()}
        missing = [i for i in range(len(self)) if _latents_path(self.folder, self._list, i).name not in existing]
        if missing:
            raise ValueError(
                f"The cache '{self.folder}' is not complete: {len(missing)} of {len(self)} samples are missing, first "
                f"'{self.names[missing[0]]}'; build it again to go on"
            )
        self.text.check(self.prompts)

    @property
    def names(self) -> list[str]:
        """The names of the samples, in order."""
        return [sample.name for sample in self._list.samples]

    @property
    def prompts(self) -> list[str]:
        """All prompts of the samples, each once."""
        return self._list.prompts

    def __len__(self) -> int:
        return len(self._list.samples)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            ValueError: If a file is damaged.
        """
        sample = self._list.samples[index]
        return {
            "latents": self.latents(index),
            "prompt_embeds": torch.stack([self._embeds(self.prompts[prompt]) for prompt in sample.prompts]),
            "shot_index": torch.tensor(sample.shot_index, dtype=torch.int64),
            "loss_mask": torch.tensor(sample.loss_mask, dtype=torch.bool),
            "name": sample.name,
        }

    def latents(self, index: int) -> torch.Tensor:
        """
        Return the normalized latents of a sample, float32 `[C, F, h, w]`.

        Raises:
            ValueError: If their file is damaged.
        """
        return self._stored_latents(index).float()

    def _stored_latents(self, index: int) -> torch.Tensor:
        path = _latents_path(self.folder, self._list, index)
        if path in self._kept:
            return self._kept[path].clone()  # the caller may change an item
        try:
            latents = load_tensor(path)
        except FileNotFoundError as error:
            raise damaged(path, "it is no longer there") from error
        if latents.ndim != 4 or latents.shape[1] != self.num_latent_frames or latents.dtype not in STORED_DTYPES:
            found = f"{latents.dtype} {tuple(latents.shape)}"
            raise damaged(path, f"latents are [C, {self.num_latent_frames}, h, w], but it holds {found}")
        return self._keep(path, latents)

    def _embeds(self, prompt: str) -> torch.Tensor:
        return self._kept[prompt] if prompt in self._kept else self._keep(prompt, self.text.load(prompt))

    def _keep(self, key: Path | str, tensor: torch.Tensor) -> torch.Tensor:
        """Keep a tensor in memory, up to the limit. Those that are read first are kept: as every epoch has a new
        order, no other choice would save more reads."""
        size = tensor.numel() * tensor.element_size()
        if self._kept_bytes + size <= self.memory_limit:
            self._kept[key] = tensor.clone()
            self._kept_bytes += size
        return tensor


def collate(items: Sequence[dict]) -> dict:
    """Collate items into one batch: tensors are stacked, integers become int64 `[B]`, anything else becomes a list. Of
    items that could not be read, see `WithSampleId`, only these."""
    items = [item for item in items if "failure" in item] or items
    batch = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if isinstance(first, torch.Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(first, int):
            batch[key] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[key] = values
    return batch


def _latents_path(folder: Path, samples: SampleList, index: int) -> Path:
    return folder / f"{samples.samples[index].latents}{TENSOR_SUFFIX}"


def _report_unused(folder: Path, samples: SampleList) -> None:
    """Say how many files are of clips that are not in the training set (any more); they may be wanted again."""
    used = {f"{sample.latents}{TENSOR_SUFFIX}" for sample in samples.samples}
    unused = [path for path in folder.glob(f"*{TENSOR_SUFFIX}") if path.name not in used]
    if unused:
        size = sum(path.stat().st_size for path in unused) / 2**20
        logger.info("%d file(s) in '%s' (%.0f MiB) belong to no sample of the training set", len(unused), folder, size)
