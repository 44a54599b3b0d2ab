"""Error recycling: training the network on its own mistakes (after Stable Video Infinity, as LongLive-2.0 uses it).

Teacher forcing shows the network a history that is perfect; generation shows it one that the network itself made.
Errors stored in past steps make up for that: they are added to the clean history, to the latents before they are
noised, or to the noise. The network still has to predict the clean video, so it learns to correct its errors.
"""

from dataclasses import dataclass, field

import numpy as np
import torch


KINDS = ("latent", "noise")
SMALLEST_SCALE, LARGEST_SCALE = 0.7, 1.3  # an error is scaled by a number drawn uniformly between them


@dataclass(frozen=True)
class RecyclingSettings:
    """How errors are stored and used; these are also options of the command line. The defaults are those of
    LongLive-2.0's AR stage."""

    error_recycling: bool = field(
        default=False, metadata={"help": "Train on errors that the network made in past steps (error recycling)."}
    )
    error_clean_probability: float = field(
        default=0.2, metadata={"help": "The probability that no stored error is added to a clip."}
    )
    error_context_probability: float = field(
        default=0.9, metadata={"help": "The probability of adding stored errors to the clean history of other clips."}
    )
    error_latent_probability: float = field(
        default=0.9,
        metadata={"help": "The probability of adding stored errors to their latents before they are noised."},
    )
    error_noise_probability: float = field(
        default=0.01, metadata={"help": "The probability of adding stored errors to their noise."}
    )
    error_update_probability: float = field(
        default=0.1, metadata={"help": "The probability of storing the errors made on a clip that none was added to."}
    )
    error_num_buckets: int = field(
        default=50,
        metadata={"help": "The number of buckets that errors are stored in, by the timestep at which they were made."},
    )
    error_bucket_size: int = field(
        default=500,
        metadata={
            "help": "The size of a bucket, in errors of one chunk; when it is full, new ones replace the oldest."
        },
    )
    error_warmup_steps: int = field(
        default=50, metadata={"help": "The number of steps at the beginning that only store errors."}
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"--{name} is a probability in [0, 1], got {value}")
        for name, lowest in {"error_num_buckets": 1, "error_bucket_size": 1, "error_warmup_steps": 0}.items():
            if vars(self)[name] < lowest:
                raise ValueError(f"--{name} must be at least {lowest}, got {vars(self)[name]}")


@dataclass(frozen=True)
class RecyclingPlan:
    """What happens to one sample: where errors are added (to the clean history, the latents before noising, or the
    noise), and whether the errors that the network makes on it are stored."""

    context: bool = False
    latent: bool = False
    noise: bool = False
    update: bool = False


class ErrorBuffer:
    """
    Stores errors of chunks `[C, chunk_size, h, w]` on the CPU, by kind and by timestep.

    Args:
        num_buckets: The number of buckets of each kind, by timestep.
        bucket_size: The largest number of errors in a bucket; beyond it, new errors replace the oldest.
        num_train_timesteps: The largest timestep; timesteps are in [0, num_train_timesteps].
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
        """Return the index of the bucket of a timestep."""
        return min(int(timestep / self.num_train_timesteps * self.num_buckets), self.num_buckets - 1)

    def add(self, kind: str, timestep: float, error: torch.Tensor) -> None:
        """Store an error `[C, chunk_size, h, w]` made at a timestep; it replaces the oldest of a full bucket."""
        index = self.bucket(timestep)
        bucket, place = self._errors[kind][index], self._added[kind][index] % self.bucket_size
        error = error.detach().to("cpu", torch.float32, copy=True)
        if place < len(bucket):
            bucket[place] = error
        else:
            bucket.append(error)
        self._added[kind][index] += 1

    def draw(self, kind: str, rng: np.random.Generator, timestep: float | None = None) -> torch.Tensor | None:
        """Return a stored error made at about this timestep (None: at any timestep), or None while there is none."""
        index = None if timestep is None else self.bucket(timestep)
        filled = [i for i, bucket in enumerate(self._errors[kind]) if bucket and index in (None, i)]
        if not filled:
            return None
        bucket = self._errors[kind][filled[rng.integers(len(filled))]]
        return bucket[rng.integers(len(bucket))]

    def state_dict(self) -> dict:
        """Return all errors and counts, as plain lists and stacked tensors."""
        stacked = {
            kind: [torch.stack(bucket) if bucket else None for bucket in buckets]
            for kind, buckets in self._errors.items()
        }
        return {"errors": stacked, "added": {kind: list(counts) for kind, counts in self._added.items()}}

    def load_state_dict(self, state: dict) -> None:
        """
        Restore a saved state.

        Raises:
            ValueError: If the state is that of a buffer of another size.
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
    """Adds stored errors to samples, and stores new ones. All draws come from the generators that it is given."""

    def __init__(self, settings: RecyclingSettings, chunk_size: int):
        self.settings, self.chunk_size = settings, chunk_size
        self.buffer = ErrorBuffer(settings.error_num_buckets, settings.error_bucket_size)

    def plan(self, rng: np.random.Generator, step: int) -> RecyclingPlan:
        """Decide what happens to a sample at a step."""
        settings = self.settings
        clean, context, latent, noise, update = rng.random(5)
        if step < settings.error_warmup_steps:
            return RecyclingPlan(update=True)
        if clean < settings.error_clean_probability:
            return RecyclingPlan(update=bool(update < settings.error_update_probability))
        return RecyclingPlan(
            context=bool(context < settings.error_context_probability),
            latent=bool(latent < settings.error_latent_probability),
            noise=bool(noise < settings.error_noise_probability),
        )

    def add_errors(
        self, states: torch.Tensor, kind: str, timesteps: torch.Tensor | None, rng: np.random.Generator
    ) -> torch.Tensor:
        """
        Return latents or noise with a stored error added to each chunk.

        Args:
            states: The latents or the noise of one sample, `[C, F, h, w]`; not changed.
            kind: The kind of errors, "latent" or "noise".
            timesteps: The timestep of each frame, `[F]`, to add errors that were made at about the timestep of the
                chunk; None to add errors made at any timestep.
            rng: The random generator that decides which errors are added.
        """
        states = states.clone()
        for index, chunk in enumerate(states.split(self.chunk_size, dim=1)):
            timestep = None if timesteps is None else timesteps[index * self.chunk_size].item()
            error = self.buffer.draw(kind, rng, timestep)
            scale = rng.uniform(SMALLEST_SCALE, LARGEST_SCALE)
            if error is not None:
                chunk.add_(error.to(chunk), alpha=scale)
        return states

    def keep_errors(
        self, kind: str, predicted: torch.Tensor, true: torch.Tensor, timesteps: torch.Tensor, loss_mask: torch.Tensor
    ) -> None:
        """Store the errors of one sample's chunks, except for chunks in which some frames bear no loss.

        Args:
            kind: The kind of errors, "latent" or "noise".
            predicted, true: The predicted and the true latents or noise, `[C, F, h, w]`.
            timesteps, loss_mask: The timestep of each frame, and whether it bears loss, `[F]`.
        """
        errors = (predicted.detach() - true).split(self.chunk_size, dim=1)
        for index, error in enumerate(errors):
            frames = slice(index * self.chunk_size, (index + 1) * self.chunk_size)
            if loss_mask[frames].all():
                self.buffer.add(kind, timesteps[frames][0].item(), error)
