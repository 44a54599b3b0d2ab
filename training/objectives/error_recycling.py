"""Error recycling: training on one's own mistakes (after Stable Video Infinity, as LongLive-2.0 uses it).

Teacher forcing shows the network a history that is perfect; generation shows it one that the network itself made. Kept
errors of past steps, added to what the network is shown now, stand in for that: to the clean history, to the latents
before they are noised, or to the noise. What it has to predict stays the clean video, so it learns to correct.
"""

from dataclasses import dataclass

import numpy as np
import torch


KINDS = ("latent", "noise")


@dataclass(frozen=True)
class RecyclingSettings:
    """
    How errors are kept and used; the defaults are those of LongLive-2.0's AR stage.

    Args:
        clean_probability: Of a sample that nothing is added to.
        context_probability, latent_probability, noise_probability: Of adding an error to the clean history, to the
            latents before noising, to the noise, of a sample that is not left clean.
        update_probability: Of keeping the errors that the network makes on a clean sample.
        smallest_scale, largest_scale: An error is scaled by a number drawn uniformly between them.
        num_buckets: Errors are kept by the time at which they were made, in so many classes.
        bucket_size: Errors (of one chunk each) in a class; beyond it, new ones replace the oldest.
        warmup_steps: Steps that only collect.
    """

    clean_probability: float = 0.2
    context_probability: float = 0.9
    latent_probability: float = 0.9
    noise_probability: float = 0.01
    update_probability: float = 0.1
    smallest_scale: float = 0.7
    largest_scale: float = 1.3
    num_buckets: int = 50
    bucket_size: int = 500
    warmup_steps: int = 50


@dataclass(frozen=True)
class RecyclingPlan:
    """What happens to one sample: where errors are added (to the clean history, the latents before noising, the
    noise), and whether the errors that the network makes on it are kept."""

    context: bool = False
    latent: bool = False
    noise: bool = False
    update: bool = False


class ErrorBuffer:
    """
    Errors of chunks `[C, chunk_size, h, w]`, on the CPU, by kind and by time.

    Args:
        num_buckets, bucket_size: As in [`RecyclingSettings`].
        num_train_timesteps: Times are in [0, num_train_timesteps].
    """

    def __init__(self, num_buckets: int, bucket_size: int, num_train_timesteps: int = 1000):
        if num_buckets < 1 or bucket_size < 1:
            raise ValueError(f"An error buffer needs buckets of at least 1, got {num_buckets} of {bucket_size}.")
        self.num_buckets, self.bucket_size, self.num_train_timesteps = num_buckets, bucket_size, num_train_timesteps
        self._errors = {kind: [[] for _ in range(num_buckets)] for kind in KINDS}
        self._added = {kind: [0] * num_buckets for kind in KINDS}

    def __len__(self) -> int:
        return sum(len(bucket) for buckets in self._errors.values() for bucket in buckets)

    def bucket(self, timestep: float) -> int:
        """The class of a time."""
        return min(int(timestep / self.num_train_timesteps * self.num_buckets), self.num_buckets - 1)

    def add(self, kind: str, timestep: float, error: torch.Tensor) -> None:
        """Keep an error `[C, chunk_size, h, w]` made at a time; the oldest of a full class is forgotten."""
        number = self.bucket(timestep)
        bucket, place = self._errors[kind][number], self._added[kind][number] % self.bucket_size
        error = error.detach().to("cpu", torch.float32, copy=True)
        if place < len(bucket):
            bucket[place] = error
        else:
            bucket.append(error)
        self._added[kind][number] += 1

    def draw(self, kind: str, chance: np.random.Generator, timestep: float | None = None) -> torch.Tensor | None:
        """A kept error made at about this time, or (None) at any time; None while there is none."""
        number = None if timestep is None else self.bucket(timestep)
        filled = [i for i, bucket in enumerate(self._errors[kind]) if bucket and number in (None, i)]
        if not filled:
            return None
        bucket = self._errors[kind][filled[chance.integers(len(filled))]]
        return bucket[chance.integers(len(bucket))]

    def state_dict(self) -> dict:
        """Everything, as plain lists and stacked tensors."""
        stacked = {
            kind: [torch.stack(bucket) if bucket else None for bucket in buckets]
            for kind, buckets in self._errors.items()
        }
        return {"errors": stacked, "added": {kind: list(counts) for kind, counts in self._added.items()}}

    def load_state_dict(self, state: dict) -> None:
        """
        Raises:
            ValueError: Of a buffer of another size.
        """
        for kind in KINDS:
            stacked = state["errors"][kind]
            most = max((len(bucket) for bucket in stacked if bucket is not None), default=0)
            if len(stacked) != self.num_buckets or most > self.bucket_size:
                raise ValueError(
                    f"The checkpoint's error buffer has {len(stacked)} buckets of up to {most}, this one "
                    f"{self.num_buckets} of {self.bucket_size}."
                )
            self._errors[kind] = [[] if bucket is None else list(bucket) for bucket in stacked]
            self._added[kind] = list(state["added"][kind])


class ErrorRecycler:
    """Adds kept errors to samples, and keeps new ones. All draws are functions of the generator it is handed."""

    def __init__(self, settings: RecyclingSettings, chunk_size: int):
        self.settings, self.chunk_size = settings, chunk_size
        self.buffer = ErrorBuffer(settings.num_buckets, settings.bucket_size)

    def plan(self, chance: np.random.Generator, step: int) -> RecyclingPlan:
        """What happens to a sample at a step."""
        settings = self.settings
        clean, context, latent, noise, update = chance.random(5)
        if step < settings.warmup_steps:
            return RecyclingPlan(update=True)
        if clean < settings.clean_probability:
            return RecyclingPlan(update=bool(update < settings.update_probability))
        return RecyclingPlan(
            context=bool(context < settings.context_probability),
            latent=bool(latent < settings.latent_probability),
            noise=bool(noise < settings.noise_probability),
        )

    def add_errors(
        self, states: torch.Tensor, kind: str, timesteps: torch.Tensor | None, chance: np.random.Generator
    ) -> torch.Tensor:
        """
        Args:
            states: Latents or noise of one sample, `[C, F, h, w]`; not changed.
            kind: Of errors, "latent" or "noise".
            timesteps: The time of each frame, `[F]`, for errors made at about the time of their chunk; None: at any.
        """
        settings, states = self.settings, states.clone()
        for index, chunk in enumerate(states.split(self.chunk_size, dim=1)):
            timestep = None if timesteps is None else timesteps[index * self.chunk_size].item()
            error = self.buffer.draw(kind, chance, timestep)
            scale = chance.uniform(settings.smallest_scale, settings.largest_scale)
            if error is not None:
                chunk.add_(error.to(chunk), alpha=scale)
        return states

    def keep_errors(
        self, kind: str, predicted: torch.Tensor, true: torch.Tensor, timesteps: torch.Tensor, bears_loss: torch.Tensor
    ) -> None:
        """Keep the errors of one sample's chunks. Chunks that bear no loss, or in part, have no error to speak of.

        Args:
            predicted, true: `[C, F, h, w]`.
            timesteps, bears_loss: Of the frames, `[F]`.
        """
        errors = (predicted.detach() - true).split(self.chunk_size, dim=1)
        for index, error in enumerate(errors):
            frames = slice(index * self.chunk_size, (index + 1) * self.chunk_size)
            if bears_loss[frames].all():
                self.buffer.add(kind, timesteps[frames][0].item(), error)
