"""Teacher forcing: what the network is shown, and what it is to predict (LongLive-2.0, arXiv 2605.18739).

The network sees a clip twice: clean, as the history that generation will have in its cache, and noised, every chunk to
a level of its own. A noisy chunk sees the clean chunks before it and itself, so one forward trains all chunks at once.

All that is random about a sample is a function of the run's seed and of the sample's id in the run, and is drawn for
the whole clip. So samples are shown in the same way if a run is resumed, is spread over more processes, or splits each
clip over several of them.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from longlive_diffusers import LongLiveScheduler
from longlive_diffusers.parallel import FrameLayout
from objectives.error_recycling import ErrorRecycler, RecyclingPlan


WEIGHTINGS = ("longlive", "none")


@dataclass(frozen=True)
class TeacherForcingSettings:
    """What the network is shown; these are also options of the command line."""

    weighting_scheme: Literal["longlive", "none"] = field(
        default="longlive",
        metadata={
            "help": "The weight of the loss by timestep: 'longlive' is a bell around 500, 'none' weighs all alike."
        },
    )
    image_probability: float = field(
        default=0.0,
        metadata={
            "help": "The probability that a clip is trained as image-to-video: its first latent frame is given, at "
            "timestep 0 and without loss."
        },
    )
    prompt_dropout: float = field(
        default=0.0,
        metadata={"help": "The probability that a clip's prompts are replaced by the empty prompt, for guidance."},
    )
    history_noise_probability: float = field(
        default=0.0,
        metadata={
            "help": "The probability that a clip's clean history is noised, to a timestep that the network is told."
        },
    )
    history_noise_max_timestep: float = field(
        default=100.0,
        metadata={"help": "The largest timestep of the noise added to the clean history, in [0, 1000]."},
    )
    multi_shot_rope_offset: float | None = field(
        default=None,
        metadata={
            "help": "The distance in time positions added at each cut, as in generation (default: the pipeline's)."
        },
    )

    def __post_init__(self):
        if self.weighting_scheme not in WEIGHTINGS:
            raise ValueError(f"--weighting_scheme is one of {', '.join(WEIGHTINGS)}, got {self.weighting_scheme!r}")
        for name in ("image_probability", "prompt_dropout", "history_noise_probability"):
            value = vars(self)[name]
            if not 0 <= value <= 1:
                raise ValueError(f"--{name} is a probability in [0, 1], got {value}")
        if not 0 <= self.history_noise_max_timestep <= 1000:
            raise ValueError(f"--history_noise_max_timestep is in [0, 1000], got {self.history_noise_max_timestep}")
        if self.multi_shot_rope_offset is not None and self.multi_shot_rope_offset < 0:
            raise ValueError(f"--multi_shot_rope_offset must be at least 0, got {self.multi_shot_rope_offset}")


@dataclass(frozen=True)
class SampleDraws:
    """The random draws for one clip of F frames: `timestep` `[F]`, `noise` and `history_noise` `[C, F, h, w]`."""

    timestep: torch.Tensor
    noise: torch.Tensor
    history_noise: torch.Tensor
    history_timestep: float
    is_image_to_video: bool
    drops_prompt: bool
    recycling: RecyclingPlan


@dataclass
class PreparedBatch:
    """
    The part of a batch that a process works on: its frames (all of them without sequence parallelism) of its clips.

    Args:
        arguments: The arguments of the transformer's forward.
        latents: The clean video, `[B, C, F, h, w]`.
        noise, target: The noise, and the velocity to predict; shaped like the latents.
        frame_weight: The weight of each frame in the loss, `[B, F]`; 0 where it bears none.
        loss_mask: Which frames bear loss, bool `[B, F]`.
        recycling: The recycling plan of each clip.
    """

    arguments: dict[str, torch.Tensor]
    latents: torch.Tensor
    noise: torch.Tensor
    target: torch.Tensor
    frame_weight: torch.Tensor
    loss_mask: torch.Tensor
    recycling: list[RecyclingPlan]


class TeacherForcing:
    """
    Prepares batches for the network, and computes the errors of its predictions.

    Args:
        scheduler: The scheduler, which defines the noise process, the velocity and the weights.
        settings: The settings of what the network is shown.
        multi_shot_rope_offset: The distance in time positions added at each cut.
        seed: The seed of the run.
        layout: The split of clips over the ranks of a sequence-parallel group (of size 1 without it).
        rank: The rank of this process in that group.
        empty_prompt: The embeddings of the empty prompt, `[L, D]`.
        recycler: The recycler, which adds and stores errors; None for no error recycling.
    """

    def __init__(
        self,
        scheduler: LongLiveScheduler,
        settings: TeacherForcingSettings,
        *,
        multi_shot_rope_offset: float,
        seed: int,
        layout: FrameLayout,
        rank: int,
        empty_prompt: torch.Tensor,
        recycler: ErrorRecycler | None = None,
    ):
        self.scheduler, self.settings, self.seed = scheduler, settings, seed
        self.multi_shot_rope_offset = multi_shot_rope_offset
        self.layout, self.rank = layout, rank
        self.empty_prompt, self.recycler = empty_prompt, recycler

    def draw(self, sample_id: int, step: int, shape: torch.Size) -> SampleDraws:
        """
        Draw all that is random about a sample.

        Args:
            sample_id: The sample's id in the run.
            step: The step of the run; error recycling begins after a warm-up.
            shape: The shape of the clip's latents, `[C, F, h, w]`, with all frames even if this rank has only some.
        """
        settings, rng = self.settings, np.random.default_rng([self.seed, sample_id])
        # Everything that might be needed is drawn, in a fixed order, so that no setting changes another one's draws.
        image, dropout, history, level = rng.random(4)
        index = torch.from_numpy(rng.integers(len(self.scheduler.training_timesteps), size=self.layout.num_chunks))
        recycling_rng = np.random.default_rng([self.seed, sample_id, 1])
        plan = RecyclingPlan() if self.recycler is None else self.recycler.plan(recycling_rng, step)
        noise, history_noise = (
            torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32)) for _ in range(2)
        )
        noised_history = history < settings.history_noise_probability
        return SampleDraws(
            timestep=self.scheduler.training_timesteps[index].repeat_interleave(self.layout.chunk_size),
            noise=noise,
            history_noise=history_noise,
            history_timestep=float(level * settings.history_noise_max_timestep) if noised_history else 0.0,
            is_image_to_video=bool(image < settings.image_probability),
            drops_prompt=bool(dropout < settings.prompt_dropout),
            recycling=plan,
        )

    def with_draws(self, batch: dict, step: int) -> dict:
        """
        Return a batch with its random draws, `draws`. They depend on nothing that training changes, so that this can
        run ahead of the network, in another thread.

        Args:
            batch: The collated items of a `LatentDataset`, or videos in place of their `latents`, wrapped in
                `WithSampleId`.
            step: The step of the run that the batch is for.
        """
        if "latents" in batch:
            shape = self._clip_shape(batch["latents"])
            batch = batch | {"draws": [self.draw(sample_id, step, shape) for sample_id in batch["sample_id"].tolist()]}
        return batch

    def prepare(self, batch: dict, step: int, device: torch.device) -> PreparedBatch:
        """
        Return what the network is shown of a batch, and what it has to predict.

        Args:
            batch: The collated items of a `LatentDataset` wrapped in `WithSampleId`; `latents` may also hold this
                rank's frames only, `[B, C, F / N, h, w]`. What [`with_draws`] has not drawn yet is drawn here.
            step: The step of the run.
            device: The device of the network's inputs, the target and the weights.
        """
        layout, rank, settings, scheduler = self.layout, self.rank, self.settings, self.scheduler
        latents, sample_ids = batch["latents"], batch["sample_id"].tolist()
        draws = (batch if "draws" in batch else self.with_draws(batch, step))["draws"]
        if latents.shape[2] == layout.num_frames:
            latents = layout.shard_latents(latents, rank)
        noise, history_noise = (
            layout.shard_latents(torch.stack(states), rank)
            for states in zip(*((draw.noise, draw.history_noise) for draw in draws), strict=True)
        )
        timestep = layout.shard_frames(torch.stack([draw.timestep for draw in draws]), rank).clone()
        history_timestep = torch.tensor([draw.history_timestep for draw in draws])[:, None].expand_as(timestep)
        # From here on the mask has one value per frame instead of one per chunk: a given first frame bears no loss.
        loss_mask = layout.shard_chunks(batch["loss_mask"], rank).repeat_interleave(layout.chunk_size, dim=1)
        embeds = layout.shard_chunks(batch["prompt_embeds"], rank).clone()
        for index, draw in enumerate(draws):
            if draw.drops_prompt:
                embeds[index] = self.empty_prompt.to(embeds)

        clean, before_noise, noise = self._recycle(latents, noise, timestep, draws, sample_ids)
        clean = scheduler.add_noise(clean, history_noise, history_timestep)
        noisy = scheduler.add_noise(before_noise, noise, timestep)
        if rank == 0:  # the rank that holds the first frame
            for index, draw in enumerate(draws):
                if draw.is_image_to_video:
                    noisy[index, :, 0] = latents[index, :, 0]
                    timestep[index, 0], loss_mask[index, 0] = 0, False

        weight = scheduler.weight(timestep) if settings.weighting_scheme == "longlive" else torch.ones_like(timestep)
        shots = batch["shot_index"].repeat_interleave(layout.chunk_size, dim=1)
        positions = torch.arange(layout.num_frames) + self.multi_shot_rope_offset * shots
        arguments = {"hidden_states": noisy, "timestep": timestep, "encoder_hidden_states": embeds}
        if layout.num_chunks > 1:  # a single chunk has no history
            arguments |= {"clean_hidden_states": clean, "clean_timestep": history_timestep}
        return PreparedBatch(
            arguments={name: tensor.to(device) for name, tensor in arguments.items()}
            | {"frame_positions": layout.shard_frames(positions, rank)},
            latents=latents,
            noise=noise,
            target=scheduler.velocity(latents, noise).to(device),
            frame_weight=(weight * loss_mask).to(device),
            loss_mask=loss_mask,
            recycling=[draw.recycling for draw in draws],
        )

    def error_sum(self, velocity: torch.Tensor, batch: PreparedBatch) -> torch.Tensor:
        """Return the sum of the weighted squared errors of all frames that bear loss. The loss is this sum divided by
        the number of those frames.

        Args:
            velocity: The network's prediction, `[B, C, F, h, w]`.
            batch: The batch that the network was shown.
        """
        per_frame = (velocity.float() - batch.target).square().mean(dim=(1, 3, 4))  # [B, F]
        return (per_frame * batch.frame_weight).sum()

    @torch.no_grad()
    def keep_errors(self, velocity: torch.Tensor, batch: PreparedBatch) -> None:
        """Store the errors of the clips that the recycling plan chose for that."""
        if self.recycler is None or not any(plan.update for plan in batch.recycling):
            return
        velocity, timestep = velocity.float().cpu(), batch.arguments["timestep"].cpu()
        noisy = batch.arguments["hidden_states"].cpu()
        x0 = self.scheduler.x0(noisy, velocity, timestep)
        sigma = self.scheduler.sigmas_at(timestep)[:, None, :, None, None]
        noise = noisy + (1 - sigma) * velocity  # the other end of the path that the velocity points along
        for index, plan in enumerate(batch.recycling):
            if plan.update:
                frames = (timestep[index], batch.loss_mask[index])
                self.recycler.keep_errors("latent", x0[index], batch.latents[index], *frames)
                self.recycler.keep_errors("noise", noise[index], batch.noise[index], *frames)

    def _clip_shape(self, latents: torch.Tensor) -> torch.Size:
        """Return `[C, F, h, w]` of whole clips, of which `latents` `[B, C, frames, h, w]` may hold some frames."""
        return torch.Size((latents.shape[1], self.layout.num_frames, *latents.shape[3:]))

    def _recycle(self, latents, noise, timestep, draws: list[SampleDraws], sample_ids: list[int]):
        """Return the clean history, the latents before noising and the noise, with past errors added where planned."""
        if self.recycler is None:
            return latents, latents, noise
        clean, before_noise, noise = latents.clone(), latents.clone(), noise.clone()
        for index, (draw, sample_id) in enumerate(zip(draws, sample_ids, strict=True)):
            rng = np.random.default_rng([self.seed, sample_id, 2, self.rank])
            if draw.recycling.context:
                clean[index] = self.recycler.add_errors(clean[index], "latent", None, rng)
            if draw.recycling.latent:
                before_noise[index] = self.recycler.add_errors(before_noise[index], "latent", timestep[index], rng)
            if draw.recycling.noise:
                noise[index] = self.recycler.add_errors(noise[index], "noise", timestep[index], rng)
        return clean, before_noise, noise
