"""From prompts to what distillation trains on: texts, and first frames if asked for, are encoded, then read."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from data.cache_files import check_cache
from data.clips import VideoDataset, frame_rate
from data.latent_cache import LatentDataset, cache_settings
from data.layouts import scan
from data.loading import ClipShape, encode_videos, list_skipped
from data.prompt_dataset import PromptDataset, distinct_prompts, plan_chunks
from data.prompt_list import PromptSample, prompts_of, read_prompts
from data.sample_list import describe
from data.text_cache import TextCache
from data.text_encoder import TextEncoder, encode_missing
from longlive_diffusers import LongLivePipeline
from run.agreement import on_main_process
from run.arguments import PromptDataArguments


def open_prompts(
    accelerator: Accelerator,
    arguments: PromptDataArguments,
    shape: ClipShape,
    pipe: LongLivePipeline,
    encoder: TextEncoder,
    other_prompts: Sequence[str],
    cache: Path,
    output: Path,
) -> tuple[PromptDataset, TextCache]:
    """
    Read the prompts, encode what is not in the caches, and return the data of distillation and its text embeddings,
    which include those of the empty prompt and of `other_prompts`. Every process has to call this.

    Args:
        accelerator: The processes of the run.
        arguments: Where prompts are, and images if videos are to continue from them.
        shape: The size of the videos that are made.
        pipe: The run's pipeline: its VAE, and its scene-cut prefix.
        encoder: The run's text encoder, which is loaded if prompts are missing in the cache.
        other_prompts: What else is looked up in the cache: the texts of validation, a negative prompt.
        cache: The folder of the caches, `text/` and `first_frames/`.
        output: The run's folder, for the list of the samples that cannot be used.

    Raises:
        ValueError: If it is not clear where prompts or images are, they cannot be read, or a cache was made with other
            settings.
    """
    source = _source(arguments)
    texts, frames = cache / "text", cache / "first_frames"
    check_cache(texts, {"max_sequence_length": encoder.max_sequence_length})
    videos = None
    if arguments.image_conditioning:
        videos = _open_videos(accelerator, arguments, shape, cache, frames, pipe, output)
        usable = set(videos.names)
        samples = on_main_process(accelerator, lambda: _prompts_of_videos(source, arguments.caption_column, usable))
    else:
        samples = on_main_process(accelerator, lambda: read_prompts(source, arguments.caption_column))
    num_chunks, prefix = shape.num_latent_frames // shape.chunk_size, pipe.config.scene_cut_prefix
    prompts = distinct_prompts(plan_chunks(sample, num_chunks, prefix) for sample in samples)
    encode_missing(accelerator, encoder, ["", *prompts, *other_prompts], texts)
    if videos is not None:
        encode_videos(accelerator, arguments, pipe, videos, frames)
    accelerator.wait_for_everyone()
    text_cache = TextCache(texts, max_sequence_length=encoder.max_sequence_length)
    first_frames = None
    if videos is not None:
        first_frames = LatentDataset(frames, texts, encoder.max_sequence_length, samples=describe(videos))
    return PromptDataset(samples, text_cache, num_chunks, prefix, first_frames), text_cache


def _source(arguments: PromptDataArguments) -> Path:
    """Return where prompts are: a file, or the folder of a training set."""
    prompts, videos = arguments.prompts, arguments.train_data_dir
    if not arguments.image_conditioning:
        if videos is not None:
            raise ValueError(
                f"--train_data_dir '{videos}' is only for --image_conditioning true; to read its captions alone, give "
                "it as --prompts"
            )
        if prompts is None:
            raise ValueError("--prompts is missing: a .txt or .jsonl file, or a training set with captions")
        return Path(prompts)
    if videos is None:
        raise ValueError("--image_conditioning true continues from first frames: it needs --train_data_dir")
    if prompts is not None:
        raise ValueError(
            f"--image_conditioning true takes the captions of --train_data_dir '{videos}': leave out --prompts "
            f"'{prompts}'"
        )
    return Path(videos)


def _open_videos(
    accelerator: Accelerator,
    arguments: PromptDataArguments,
    shape: ClipShape,
    cache: Path,
    frames: Path,
    pipe: LongLivePipeline,
    output: Path,
) -> VideoDataset:
    """Return the first frames of the videos as videos of one frame: what follows it has no part in its latent."""
    sizes = {"height": shape.height, "width": shape.width, "num_latent_frames": 1, "chunk_size": 1}
    check_cache(frames, {**sizes, "fps": str(frame_rate(arguments.fps))})
    with accelerator.main_process_first():
        videos = VideoDataset(
            str(arguments.train_data_dir),
            **sizes,
            fps=arguments.fps,
            scene_cut_prefix=pipe.config.scene_cut_prefix,
            caption_column=arguments.caption_column,
            index_folder=cache / "index",
            progress=accelerator.is_main_process,
        )
    list_skipped(accelerator, videos, output)
    if accelerator.is_main_process:
        check_cache(frames, cache_settings(videos, pipe.vae))
    return videos


def _prompts_of_videos(root: Path, caption_column: str | None, usable: set[str]) -> list[PromptSample]:
    samples, _ = scan(root, caption_column=caption_column)
    return [prompts_of(sample) for sample in samples if sample.name in usable]
