"""Videos with captions, in the form that training takes: whole chunks of pixels, a prompt and a shot index per chunk.

`layouts.py` finds the samples of a training set on disk, `videos.py` reads frames, and `conditioning.py` says how
chunks are conditioned; this file brings them together.

Image-to-video needs no data of its own. The VAE is causal, so latent frame 0 of any video is the encoding of its first
image alone: training keeps that frame clean, and the video becomes an example of how to continue from an image.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from data.clip_index import ClipIndex
from data.conditioning import ChunkConditioning, condition_chunks
from data.layouts import scan
from data.names import writable
from data.samples import Clip, Sample, SampleError, describe_skipped
from data.videos import ClipError, read_frames
from longlive_diffusers import pixel_frames, whole_chunks
from longlive_diffusers.user_path import user_path


__all__ = ["Clip", "Sample", "VideoDataset", "scan"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """A usable sample: those of its clips that are used, the digests of their files, how many chunks each gives."""

    name: str
    clips: tuple[Clip, ...]
    digests: tuple[str, ...]
    chunks_per_clip: tuple[int, ...]
    conditioning: ChunkConditioning


def frame_rate(fps: float) -> Fraction:
    """Return a rate in frames per second as a fraction with a denominator of at most 1001, as rates of video have."""
    return Fraction(fps).limit_denominator(1001)


class VideoDataset(Dataset):
    """
    The videos of a folder (see `layouts.py`), each `num_latent_frames` latent frames long.

    Every clip gives whole chunks only: as many as its frames allow, but no more than its entry in
    `shot_durations.txt`, than `max_chunks_per_shot`, or than the video still lacks. When the dataset is created, every
    clip is decoded as far as it might be needed. A sample with a clip that cannot be read, or is too short for one
    chunk, is left out, with the reason in `skipped` and in a warning. So the length is exact, and the same in every
    process.

    An item is a dict:
        pixels: The frames, float32 `[3, F, height, width]` in [-1, 1], with F the pixel frames of `num_latent_frames`.
        prompts: The prompt of each chunk, list[str].
        shot_index: The index of each chunk's shot, int64 `[chunks]`.
        loss_mask: Which chunks bear loss, bool `[chunks]`.
        name: The name of the sample.

    Args:
        root: The folder of the training set.
        num_latent_frames: The number of latent frames of each video, a multiple of `chunk_size`.
        chunk_size: The number of latent frames of a chunk.
        height, width: The size of the frames in pixels.
        fps: The frames per second. A clip with another rate gives its nearest frames.
        max_chunks_per_shot: The largest number of chunks of each clip, also of one that continues the clip before;
            None for no limit.
        scene_cut_prefix: The text put before the prompt of the first chunk of every shot but the first.
        pad_short_videos: Whether the last frame and prompt of a video that is too short are repeated; what is added
            bears no loss. Otherwise such a sample is left out.
        recache_switches: Whether prompt switches within a shot are trained as they are generated, with history under
            the new prompt and without loss (see `conditioning.py`). Otherwise each chunk keeps its own prompt and
            bears loss.
        index_folder: The folder where the frame counts of the clips are remembered; None to count at every start. If
            several processes share it, create the dataset in one of them first (`accelerator.main_process_first()`),
            so that the others read its results.
        caption_column: The name of the captions in a list of clips; None for the usual names.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a size is out of range, there is no such folder, or nothing in it can be used.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        num_latent_frames: int,
        chunk_size: int,
        height: int,
        width: int,
        fps: float = 24,
        max_chunks_per_shot: int | None = None,
        scene_cut_prefix: str = "The scene transitions. ",
        pad_short_videos: bool = True,
        recache_switches: bool = True,
        index_folder: str | os.PathLike | None = None,
        caption_column: str | None = None,
        progress: bool = True,
    ) -> None:
        if chunk_size < 1 or num_latent_frames < chunk_size or num_latent_frames % chunk_size:
            raise ValueError(f"num_latent_frames must be a multiple of {chunk_size} (chunks), got {num_latent_frames}")
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be at least 1, got {height}x{width}")
        if not 0 < fps <= 1000:
            raise ValueError(f"fps must be in (0, 1000], got {fps}")
        if max_chunks_per_shot is not None and max_chunks_per_shot < 1:
            raise ValueError(f"max_chunks_per_shot must be at least 1, got {max_chunks_per_shot}")
        self.root = user_path(root)
        self.num_latent_frames, self.chunk_size = num_latent_frames, chunk_size
        self.height, self.width = height, width
        self.fps = frame_rate(fps)
        self.max_chunks_per_shot, self.pad_short_videos = max_chunks_per_shot, pad_short_videos
        self.scene_cut_prefix, self.recache_switches = scene_cut_prefix, recache_switches

        samples, skipped = scan(self.root, caption_column=caption_column)
        most_chunks = min(self.num_chunks, max_chunks_per_shot or self.num_chunks)
        limit = pixel_frames(most_chunks * chunk_size, opens_video=False)
        self._index = ClipIndex(index_folder, self.fps, limit)
        self.skipped: dict[str, str] = skipped
        """The reason why a sample is not used, by the name of the sample."""
        self._entries = self._look_at(samples, progress)
        if skipped:
            logger.warning("'%s': %s", self.root, describe_skipped(skipped, len(skipped) + len(self)))

    @property
    def num_chunks(self) -> int:
        """The number of chunks of each video."""
        return self.num_latent_frames // self.chunk_size

    @property
    def num_frames(self) -> int:
        """The number of pixel frames of each video."""
        return pixel_frames(self.num_latent_frames)

    @property
    def names(self) -> list[str]:
        """The names of the samples, in order."""
        return [entry.name for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            ValueError: If a clip was changed since the dataset was created, and can no longer be read.
        """
        return {"pixels": self._pixels(self._entries[index]), **self.conditioning(index)}

    def conditioning(self, index: int) -> dict:
        """Return an item without its pixels; no video is read."""
        entry = self._entries[index]
        return {
            "prompts": list(entry.conditioning.prompts),
            "shot_index": torch.tensor(entry.conditioning.shot_index, dtype=torch.int64),
            "loss_mask": torch.tensor(entry.conditioning.loss_mask, dtype=torch.bool),
            "name": entry.name,
        }

    def distinct_prompts(self) -> list[str]:
        """Return every prompt that a chunk of any sample is conditioned on, once each, in order of appearance."""
        return list(dict.fromkeys(prompt for entry in self._entries for prompt in entry.conditioning.prompts))

    def pixel_settings(self) -> dict[str, int | str]:
        """Return what the frames of every sample depend on, beside its own clips (see `clips_digest`)."""
        return {
            "num_latent_frames": self.num_latent_frames,
            "chunk_size": self.chunk_size,
            "height": self.height,
            "width": self.width,
            "fps": str(self.fps),
        }

    def sample_settings(self) -> dict[str, str | int | bool | None]:
        """Return what else decides which samples there are, and how their chunks are conditioned."""
        return {
            "max_chunks_per_shot": self.max_chunks_per_shot,
            "scene_cut_prefix": self.scene_cut_prefix,
            "pad_short_videos": self.pad_short_videos,
            "recache_switches": self.recache_switches,
        }

    def clips_digest(self, index: int) -> str:
        """Return a digest of the clips of a sample: the content of their files, and how many chunks each gives.
        Samples of one digest have the same frames, whatever they are called and described as."""
        entry = self._entries[index]
        described = [list(pair) for pair in zip(entry.digests, entry.chunks_per_clip, strict=True)]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def _look_at(self, samples: Iterable[Sample], progress: bool) -> list[_Entry]:
        entries = []
        try:
            for sample in tqdm(samples, desc="Looking at the samples", disable=not progress, leave=False):
                try:
                    entries.append(self._entry(sample))
                except (SampleError, ClipError) as error:
                    self.skipped[sample.name] = writable(str(error))
        finally:  # also when interrupted, so that no clip is counted twice
            self._index.save()
        if not entries:
            reasons = describe_skipped(self.skipped, len(self.skipped))
            raise ValueError(f"'{self.root}' has no sample that can be used; {reasons}")
        return entries

    def _entry(self, sample: Sample) -> _Entry:
        counts, digests = self._chunks_of_clips(sample)
        clips = sample.clips[: len(counts)]
        if sum(counts) < self.num_chunks and not self.pad_short_videos:
            raise SampleError(
                f"its {len(clips)} clip(s) give {sum(counts)} chunks of {self.chunk_size} latent frames, but a video "
                f"has {self.num_chunks}"
            )
        conditioning = condition_chunks(
            clips,
            counts,
            self.num_chunks,
            scene_cut_prefix=self.scene_cut_prefix,
            recache_switches=self.recache_switches,
        )
        return _Entry(sample.name, clips, tuple(digests), tuple(counts), conditioning)

    def _chunks_of_clips(self, sample: Sample) -> tuple[list[int], list[str]]:
        """Return how many chunks each clip gives, and the digest of its file; of those that are needed."""
        counts: list[int] = []
        digests: list[str] = []
        for index, clip in enumerate(sample.clips):
            left = self.num_chunks - sum(counts)
            if not left:
                break
            sound = self._index.look_at(clip.path)
            count = whole_chunks(sound.frames, self.chunk_size, opens_video=index == 0)
            if count == 0:
                needed = pixel_frames(self.chunk_size, opens_video=index == 0)
                raise SampleError(
                    f"'{clip.path}' has {sound.frames} frames at {float(self.fps):g} a second, but its first chunk of "
                    f"{self.chunk_size} latent frames needs {needed}"
                )
            limits = [left, count, self.max_chunks_per_shot or left]
            if sample.durations is not None:
                limits.append(sample.durations[index])
            counts.append(min(limits))
            digests.append(sound.digest)
        return counts, digests

    def _pixels(self, entry: _Entry) -> torch.Tensor:
        pixels = torch.empty(3, self.num_frames, self.height, self.width)
        end = 0
        for index, (clip, chunks) in enumerate(zip(entry.clips, entry.chunks_per_clip, strict=True)):
            count = pixel_frames(chunks * self.chunk_size, opens_video=index == 0)
            # Closed at once if reading fails, not when the generator happens to be garbage-collected.
            with contextlib.closing(read_frames(clip.path, self.fps, count, self.height, self.width)) as frames:
                for frame in frames:
                    pixels[:, end] = frame.float().div_(255).mul_(2).sub_(1)
                    end += 1
        pixels[:, end:] = pixels[:, end - 1 : end]
        return pixels
