"""Caches that tests build: of tiny videos, and of texts whose embeddings say how long they are."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from data.clips import VideoDataset
from data.latent_cache import build_latent_cache
from data.text_cache import build_text_cache
from tests.support.tiny_pipeline import TEXT_DIM, TEXT_LENGTH
from tests.support.training_sets import SIDE


def dataset(root: Path, **arguments) -> VideoDataset:
    """Of 4 latent frames (13 frames) in chunks of 2."""
    defaults = {"num_latent_frames": 4, "chunk_size": 2, "height": SIDE, "width": SIDE, "progress": False}
    return VideoDataset(root, **{**defaults, **arguments})


def build(data: VideoDataset, vae: torch.nn.Module, folder: Path, **arguments) -> Path:
    build_latent_cache(data, vae, folder, device="cpu", progress=False, **arguments)
    return folder


def encode(texts: list[str]) -> torch.Tensor:
    """As many rows as the text has words."""
    embeds = torch.zeros(len(texts), TEXT_LENGTH, TEXT_DIM)
    for row, text in zip(embeds, texts, strict=True):
        row[: len(text.split())] = len(text)
    return embeds


def build_text(prompts: Iterable[str], folder: Path, encode: Callable = encode, **arguments) -> Path:
    settings = {"settings": {"encoder": "words"}, "max_sequence_length": TEXT_LENGTH, "progress": False}
    build_text_cache(prompts, encode, folder, **{**settings, **arguments})
    return folder


def latents_file(folder: Path, index: int) -> Path:
    """The file of the latents of a sample."""
    sample = json.loads((folder / "samples.json").read_text())["samples"][index]
    return folder / f"{sample['latents']}.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
