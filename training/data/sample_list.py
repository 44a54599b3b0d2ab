"""The list of samples beside cached latents: everything about a training set but its pixels.

    {"settings": {...},                       what decided which samples there are
     "prompts": ["A fox in the snow", ...],   each once
     "samples": [{"name": ..., "latents": ..., "prompts": [0, 0], "shot_index": [0, 0], "loss_mask": [true, true]}]}

Latents are named after what they were made from, so this list is all that changes when a caption is corrected, or when
samples are added, removed, renamed or put into another order.
"""

import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from data.cache_files import DamagedFileError, Settings, read_cache_json, write_json
from data.clips import VideoDataset


SAMPLES_FILE = "samples.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedSample:
    """
    Args:
        name: The name of the sample.
        latents: The name of its file of latents, without suffix.
        prompts: The index of each chunk's prompt in the list.
        shot_index: The index of each chunk's shot.
        loss_mask: Whether each chunk bears loss.
    """

    name: str
    latents: str
    prompts: list[int]
    shot_index: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class SampleList:
    """
    Args:
        settings: What decided which samples there are, and how they are conditioned.
        prompts: All prompts, each once.
        samples: The samples, in order.
    """

    settings: Settings
    prompts: list[str]
    samples: list[CachedSample]


def describe(dataset: VideoDataset) -> SampleList:
    """Return the list of the samples of a dataset."""
    prompts = dataset.distinct_prompts()
    index_of = {prompt: index for index, prompt in enumerate(prompts)}
    samples = []
    for i in range(len(dataset)):
        item = dataset.conditioning(i)
        samples.append(
            CachedSample(
                name=item["name"],
                latents=dataset.clips_digest(i)[:32],
                prompts=[index_of[prompt] for prompt in item["prompts"]],
                shot_index=item["shot_index"].tolist(),
                loss_mask=item["loss_mask"].tolist(),
            )
        )
    return SampleList(dataset.sample_settings(), prompts, samples)


def write_samples(folder: Path, samples: SampleList) -> None:
    """Write the list into the folder of a cache, unless it is already there."""
    path = folder / SAMPLES_FILE
    content = asdict(samples)
    try:
        if path.exists() and read_cache_json(path) == content:
            return
    except DamagedFileError as error:
        logger.warning("%s, and is made again", error)
    write_json(path, content)


def read_samples(folder: Path, num_chunks: int) -> SampleList:
    """
    Read the list in the folder of a cache whose samples have so many chunks.

    Raises:
        DamagedFileError: If it is damaged.
        ValueError: If there is none.
    """
    path = folder / SAMPLES_FILE
    content = read_cache_json(path)
    settings, prompts, samples = (content.get(name) for name in ("settings", "prompts", "samples"))
    is_sound = (
        isinstance(settings, dict)
        and _is_list_of(prompts, str)
        and isinstance(samples, list)
        and len(samples) > 0
        and all(_is_sample(sample, len(prompts), num_chunks) for sample in samples)
    )
    if not is_sound:
        raise DamagedFileError(
            f"'{path}' is damaged: it does not hold samples of {num_chunks} chunks; build the cache again from the "
            "videos (nothing that is there is encoded twice)"
        )
    return SampleList(settings, prompts, [CachedSample(**sample) for sample in samples])


def _is_sample(value: object, num_prompts: int, num_chunks: int) -> bool:
    if not isinstance(value, dict) or value.keys() != {"name", "latents", "prompts", "shot_index", "loss_mask"}:
        return False
    per_chunk = (("prompts", int), ("shot_index", int), ("loss_mask", bool))
    return (
        isinstance(value["name"], str)
        and isinstance(value["latents"], str)
        and re.fullmatch("[0-9a-f]{32}", value["latents"]) is not None
        and all(_is_list_of(value[name], kind) and len(value[name]) == num_chunks for name, kind in per_chunk)
        and all(0 <= prompt < num_prompts for prompt in value["prompts"])
        and all(shot >= 0 for shot in value["shot_index"])
    )


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
