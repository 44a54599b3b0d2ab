"""From a training set to batches: caches that are not complete are built, then read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from data.cache_files import SETTINGS_FILE, Settings, check_cache, module_settings
from data.clips import VideoDataset, frame_rate
from data.hub_dataset import write_list
from data.latent_cache import LatentDataset, build_latent_cache, cache_settings, collate
from data.sample_list import describe
from data.sampler import EpochSampler, WithSampleId, raise_failures
from data.text_cache import TextCache, missing_prompts
from data.text_encoder import TextEncoder, encode_missing
from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.atomic_write import write_text
from longlive_diffusers.models.streaming_vae import normalize_latents
from longlive_diffusers.parallel import FrameLayout, encode_shard
from longlive_diffusers.pipelines.prefetch import OneThread, Prefetcher
from run.arguments import DataArguments, EncodingArguments
from run.interruption import ignore_stop_requests
from run.process_mesh import ProcessMesh


Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ClipShape:
    """The sizes of the training clips: pixels, latent frames, and latent frames of a chunk."""

    height: int
    width: int
    num_latent_frames: int
    chunk_size: int


def clip_shape(
    arguments: EncodingArguments, pipe: LongLivePipeline, transformer: LongLiveTransformer3DModel
) -> ClipShape:
    """
    Return the shape of the clips; the size in pixels is the model's own by default.

    Raises:
        ValueError: If the VAE or the network cannot take the size, or the clips are not a whole number of chunks.
    """
    config, scale = transformer.config, pipe.vae_scale_factor_spatial
    height = arguments.height or config.sample_height * scale
    width = arguments.width or config.sample_width * scale
    units = (scale * config.patch_size[1], scale * config.patch_size[2])
    if height % units[0] or width % units[1]:
        raise ValueError(f"--height and --width must be multiples of {units[0]} and {units[1]}, got {height}x{width}.")
    if arguments.num_latent_frames % config.chunk_size:
        raise ValueError(
            f"--num_latent_frames {arguments.num_latent_frames} is no multiple of {config.chunk_size} (chunks)"
        )
    return ClipShape(height, width, arguments.num_latent_frames, config.chunk_size)


def open_dataset(
    accelerator: Accelerator,
    arguments: DataArguments,
    shape: ClipShape,
    pipe: LongLivePipeline,
    encoder: TextEncoder,
    other_prompts: Sequence[str],
    cache: Path,
    output: Path,
) -> tuple[Dataset, TextCache]:
    """
    Scan the videos, encode what is not in the caches, and return the training set and its text embeddings, which
    include those of the empty prompt and of `other_prompts`. Without a training set, only the caches are used, and
    the text encoder if some of `other_prompts` are missing, or to tell whether the texts are its own.

    Raises:
        ValueError: If there is neither a training set nor a complete cache, nothing in the training set can be used,
            or a cache was made with other settings.
    """
    latents, texts = cache / "latents", cache / "text"
    settings = _dataset_settings(arguments, shape, pipe)
    if arguments.train_data_dir is None and arguments.dataset_name is None:
        if not arguments.cache_latents:
            raise ValueError(
                "--cache_latents false encodes videos as they are needed: it needs --train_data_dir or --dataset_name"
            )
        if not (latents / SETTINGS_FILE).exists():
            raise ValueError(
                f"There is neither a training set (--train_data_dir or --dataset_name) nor a cache of one, '{latents}'"
            )
        settings |= {"fps": str(frame_rate(arguments.fps)), **module_settings("vae", pipe.vae)}
        dataset = LatentDataset(latents, texts, encoder.max_sequence_length, settings=settings)
        # Of a folder without a text encoder, nobody can tell whether the texts are its own.
        if encoder.is_there or missing_prompts(other_prompts, texts):
            encode_missing(accelerator, encoder, other_prompts, texts)
            accelerator.wait_for_everyone()
        return dataset, dataset.text
    _check_sizes(latents, texts, arguments, shape, encoder)
    videos = _scan_videos(accelerator, arguments, settings, cache, output)
    if arguments.cache_latents and accelerator.is_main_process:
        check_cache(latents, cache_settings(videos, pipe.vae))
    encode_missing(accelerator, encoder, ["", *videos.distinct_prompts(), *other_prompts], texts)
    if arguments.cache_latents:
        encode_videos(accelerator, arguments, pipe, videos, latents)
    accelerator.wait_for_everyone()
    if arguments.cache_latents:
        dataset = LatentDataset(latents, texts, encoder.max_sequence_length, samples=describe(videos))
        return dataset, dataset.text
    text_cache = TextCache(texts, max_sequence_length=encoder.max_sequence_length)
    return VideosWithEmbeds(videos, text_cache), text_cache


def _dataset_settings(arguments: DataArguments, shape: ClipShape, pipe: LongLivePipeline) -> Settings:
    """Return what decides which samples there are and what they are like, by the names of a dataset's arguments."""
    return {
        **asdict(shape),
        "fps": arguments.fps,
        "max_chunks_per_shot": arguments.max_chunks_per_shot,
        "scene_cut_prefix": pipe.config.scene_cut_prefix,
        "pad_short_videos": arguments.pad_short_videos,
        "recache_switches": arguments.recache_switches,
    }


def _check_sizes(latents: Path, texts: Path, arguments: DataArguments, shape: ClipShape, encoder: TextEncoder) -> None:
    """
    Check the settings of the caches that cost nothing to find out, before all clips are looked at.

    Raises:
        ValueError: If a cache was made with other settings.
    """
    if arguments.cache_latents:
        check_cache(latents, {**asdict(shape), "fps": str(frame_rate(arguments.fps))})
    check_cache(texts, {"max_sequence_length": encoder.max_sequence_length})


def _scan_videos(
    accelerator: Accelerator, arguments: DataArguments, settings: Settings, cache: Path, output: Path
) -> VideoDataset:
    """Scan all clips, in one process first; samples that cannot be used are listed in `skipped_samples.txt`."""
    with accelerator.main_process_first():
        videos = VideoDataset(
            _folder(accelerator, arguments, cache / "hub"),
            **settings,
            caption_column=arguments.caption_column,
            index_folder=cache / "index",
            progress=accelerator.is_main_process,
        )
    list_skipped(accelerator, videos, output)
    return videos


def list_skipped(accelerator: Accelerator, videos: VideoDataset, output: Path) -> None:
    """Write down which samples cannot be used, and why, if there are any; a list of an earlier start goes."""
    if not accelerator.is_main_process:
        return
    file = output / "skipped_samples.txt"
    if videos.skipped:
        write_text(file, "".join(f"  {name}: {reason}\n" for name, reason in videos.skipped.items()))
    else:
        file.unlink(missing_ok=True)


def _folder(accelerator: Accelerator, arguments: DataArguments, hub_folder: Path) -> Path:
    """Return the folder of the training set; the main process makes it first if it is a data set of the Hub."""
    for name in ("train_data_dir", "dataset_name"):
        if vars(arguments)[name] == "":
            raise ValueError(f"--{name} is empty")
    if arguments.dataset_name is None:
        return Path(arguments.train_data_dir)
    if arguments.train_data_dir is not None:
        raise ValueError(
            f"--train_data_dir '{arguments.train_data_dir}' and --dataset_name '{arguments.dataset_name}' are two "
            "training sets: give one"
        )
    if accelerator.is_main_process:
        write_list(
            arguments.dataset_name,
            hub_folder,
            config=arguments.dataset_config_name,
            split=arguments.dataset_split,
            caption_column=arguments.caption_column,
        )
    return hub_folder


def encode_videos(
    accelerator: Accelerator, arguments: EncodingArguments, pipe: LongLivePipeline, videos: VideoDataset, folder: Path
) -> None:
    """Encode every video that is not in the cache yet; each process encodes its part. Wait for all before reading."""
    build_latent_cache(
        videos,
        pipe.vae,
        folder,
        device=accelerator.device,
        batch_size=arguments.vae_batch_size,
        num_workers=arguments.dataloader_num_workers,
        progress=accelerator.is_main_process,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    pipe.vae.to("cpu")


class VideosWithEmbeds(Dataset):
    """Videos with encoded prompts: items are like those of a `LatentDataset`, with `pixels` instead of latents."""

    def __init__(self, videos: VideoDataset, texts: TextCache):
        self.videos, self.texts = videos, texts

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict:
        item = self.videos[index]
        item["prompt_embeds"] = torch.stack([self.texts.load(prompt) for prompt in item.pop("prompts")])
        return item


def batches(
    dataset: Dataset,
    mesh: ProcessMesh,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    start_batch: int,
) -> Iterator[dict]:
    """Return an endless iterator over the batches of this process's data-parallel group, from `start_batch` on."""
    sampler = EpochSampler(
        len(dataset),
        batch_size=batch_size,
        seed=seed,
        num_groups=mesh.dp_size,
        group=mesh.dp_rank,
        start_batch=start_batch,
    )
    loader = DataLoader(
        WithSampleId(dataset),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=ignore_stop_requests,
    )
    return raise_failures(loader)


@contextmanager
def read_ahead(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Within this, iterate over batches in another thread, which makes the next two while one is trained on. What they
    are must not depend on when they are made."""
    with OneThread("batches") as worker, Prefetcher(batches, worker) as ahead:
        yield ahead


@torch.no_grad()
def encode_batch(
    batch: dict, vae: torch.nn.Module, layout: FrameLayout, rank: int, halo: int, device: torch.device
) -> dict:
    """Return a batch with the normalized latents of this rank's frames in place of the pixels of the clips."""
    pixels = batch.pop("pixels").to(device, vae.dtype)
    latents = normalize_latents(vae, encode_shard(vae, pixels, layout, rank, halo).float())
    return batch | {"latents": latents.cpu()}
