"""Distribution-matching distillation (DMD, arXiv 2311.18828 and 2405.14867) of a causal video model, as in
LongLive-2.0 (arXiv 2605.18739): a generator of few steps is moved to where its videos look like its teacher's.

Three networks: the *generator* makes a video (`rollout.py`). It is noised, and two *scores* say what the clean video
is: the *real score*, which is the teacher, and the *fake score* (the critic), which is trained on the generator's own
videos at the same time. The generator's gradient is the difference of the two.

What the scores see (`score_context`) has to be what the teacher was trained on. A bidirectional teacher, made causal,
sees history that is noised like the chunk itself (`noisy`, as in the reference). A teacher that was trained by teacher
forcing has only ever seen clean history; there, the generator's own video, detached, is the history (`clean`).

All that is random is a function of the run's seed, of a sample's id in the run and of the update, and is drawn for the
whole video. So it does not depend on the number of processes, and the exit step is the same in all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import numpy as np
import torch

from longlive_diffusers import LongLiveScheduler
from longlive_diffusers.parallel import FrameLayout
from objectives.rollout import ChunkPlan


@dataclass(frozen=True)
class DistillationSettings:
    """How the generator is distilled; these are also options of the command line."""

    num_inference_steps: int = field(
        default=4, metadata={"help": "The number of solver steps that the generator is distilled to."}
    )
    start: Literal["direct", "standalone"] = field(
        default="direct",
        metadata={
            "help": "What the model to start from is: 'direct', the autoregressive model that is distilled; "
            "'standalone', the base model, whose LoRA is put onto the autoregressive model afterwards."
        },
    )
    score_context: Literal["auto", "clean", "noisy"] = field(
        default="auto",
        metadata={
            "help": "The history that the scores see: the video itself ('clean') or noised like the chunk ('noisy'); "
            "auto is clean with a direct start, and noisy with a standalone one."
        },
    )
    score_guidance_scale: float = field(
        default=4.0,
        metadata={"help": "The guidance scale of the teacher: neg + s (cond - neg); 1 is no guidance."},
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "The negative prompt of the teacher (default: the empty prompt)."}
    )
    score_timestep: Literal["clip", "chunk"] = field(
        default="clip",
        metadata={"help": "Whether the scores see one timestep for all chunks of a clip, or one for each chunk."},
    )
    min_score_timestep: float = field(
        default=20.0, metadata={"help": "The lowest timestep that the scores see, in [0, 1000]."}
    )
    max_score_timestep: float = field(
        default=980.0, metadata={"help": "The highest timestep that the scores see, in [0, 1000]."}
    )
    score_latent_frames: int | None = field(
        default=None,
        metadata={"help": "How many of the last latent frames of a roll-out the scores see (default: all)."},
    )
    gradient_chunks: int | None = field(
        default=None,
        metadata={
            "help": "How many of the last chunks of a roll-out carry a gradient (default: all that the scores see)."
        },
    )
    last_step_only: bool = field(
        default=False, metadata={"help": "Exit every roll-out at its last solver step, instead of at a random one."}
    )
    generator_interval: int = field(
        default=5,
        metadata={"help": "The generator is updated in every n-th update of the critic, beginning with the first."},
    )
    image_probability: float = field(
        default=1.0,
        metadata={"help": "With --image_conditioning, the probability that a batch of videos begins with images."},
    )
    window_size: int | None = field(
        default=None,
        metadata={"help": "The latent frames that the KV cache of the roll-out holds (default: the pipeline's)."},
    )
    sink_size: int | None = field(
        default=None, metadata={"help": "How many of the first frames are never evicted (default: the pipeline's)."}
    )
    multi_shot_sink: bool | None = field(
        default=None,
        metadata={"help": "Keep the frames that opened the current shot as well (default: as the pipeline)."},
    )
    multi_shot_rope_offset: float | None = field(
        default=None,
        metadata={
            "help": "The distance in time positions added at each cut, as in generation (default: the pipeline's)."
        },
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "nvfp4", "fp8", "fp8_attention"] = field(
        default="auto", metadata={"help": "What the roll-out's keys and values are stored as (auto: computed in)."}
    )

    def __post_init__(self):
        counts = ("num_inference_steps", "score_latent_frames", "gradient_chunks", "generator_interval", "window_size")
        ranges = dict.fromkeys(counts, (1, math.inf)) | {
            "num_inference_steps": (1, 1000),  # the timesteps that networks are trained with
            "score_guidance_scale": (0, math.inf),
            "sink_size": (0, math.inf),
            "multi_shot_rope_offset": (0, math.inf),
            "image_probability": (0, 1),
        }
        for name, (least, most) in ranges.items():
            value = vars(self)[name]
            if value is not None and not least <= value <= most:
                allowed = f"at least {least}" if most == math.inf else f"in [{least}, {most}]"
                raise ValueError(f"--{name} must be {allowed}, got {value}")
        lowest, highest = self.min_score_timestep, self.max_score_timestep
        if not 0 <= lowest < highest <= 1000:
            raise ValueError(
                f"--min_score_timestep and --max_score_timestep must rise within [0, 1000], got {lowest} and {highest}"
            )

    @property
    def sees_clean_history(self) -> bool:
        """Whether the scores see clean history."""
        if self.score_context == "auto":
            return self.start == "direct"
        return self.score_context == "clean"


class Purpose(IntEnum):
    """What a roll-out is made for; the two of an iteration have nothing random in common."""

    GENERATOR = 1
    CRITIC = 2


@dataclass(frozen=True)
class RolloutShape:
    """
    The parts of a roll-out, in latent frames and chunks.

    Args:
        num_frames: The length of the video.
        scored_frames: How many of its last frames the scores see.
        chunk_size: The number of latent frames of a chunk.
        gradient_chunks: How many of its last chunks carry a gradient.

    Raises:
        ValueError: If these are no whole chunks, or not within each other.
    """

    num_frames: int
    scored_frames: int
    chunk_size: int
    gradient_chunks: int

    def __post_init__(self):
        for name, frames in (("num_latent_frames", self.num_frames), ("score_latent_frames", self.scored_frames)):
            if frames % self.chunk_size:
                raise ValueError(f"--{name} {frames} is no multiple of {self.chunk_size} (chunks)")
        if self.scored_frames > self.num_frames:
            raise ValueError(
                f"--score_latent_frames {self.scored_frames} are more than the roll-out has, --num_latent_frames "
                f"{self.num_frames}"
            )
        if self.gradient_chunks * self.chunk_size > self.scored_frames:
            raise ValueError(
                f"--gradient_chunks {self.gradient_chunks} (of {self.chunk_size} latent frames) are more than the "
                f"scores see, {self.scored_frames} latent frames"
            )

    @classmethod
    def of(cls, settings: DistillationSettings, num_frames: int, chunk_size: int) -> "RolloutShape":
        """Return the shape of a roll-out of `num_frames` with these settings."""
        scored = num_frames if settings.score_latent_frames is None else settings.score_latent_frames
        chunks = scored // chunk_size if settings.gradient_chunks is None else settings.gradient_chunks
        return cls(num_frames, scored, chunk_size, chunks)

    @property
    def num_chunks(self) -> int:
        return self.num_frames // self.chunk_size

    @property
    def first_scored_chunk(self) -> int:
        return (self.num_frames - self.scored_frames) // self.chunk_size

    @property
    def with_gradient(self) -> range:
        """The chunks that carry a gradient, by index."""
        return range(self.num_chunks - self.gradient_chunks, self.num_chunks)


@dataclass(frozen=True)
class RolloutDraws:
    """What is random about a batch of roll-outs.

    Args:
        noise: The initial noise, `[B, C, F, h, w]`.
        score_noise: The noise that the scores see, `[B, C, scored frames, h, w]`.
        score_timestep: Its timesteps, `[B, scored frames]`.
        exit_step: The solver step that ends every chunk.
        uses_image: Whether the videos begin with an image, if there are any.
    """

    noise: torch.Tensor
    score_noise: torch.Tensor
    score_timestep: torch.Tensor
    exit_step: int
    uses_image: bool


@dataclass(frozen=True)
class ScoreInputs:
    """
    What a score is shown: this rank's frames of a clip.

    Args:
        arguments: The arguments of the network's forward, without the prompt.
        x0, noise: The clean video and the noise that was added, `[B, C, F, h, w]`.
        bears_loss: Which frames are the generator's own (and not given), bool `[B, F]`.
    """

    arguments: dict[str, torch.Tensor | None]
    x0: torch.Tensor
    noise: torch.Tensor
    bears_loss: torch.Tensor


class Distillation:
    """
    What the networks are shown, and the losses.

    Args:
        scheduler: The scheduler, which defines the noise process.
        settings: The settings of the distillation.
        shape: The parts of a roll-out.
        multi_shot_rope_offset: The distance in time positions added at each cut.
        seed: The seed of the run.
        layout: The split of the scored frames over the ranks of a sequence-parallel group (of size 1 without it).
        rank: The rank of this process in that group.
        frame_shape: The shape of a latent frame, `(C, h, w)`.
    """

    def __init__(
        self,
        scheduler: LongLiveScheduler,
        settings: DistillationSettings,
        shape: RolloutShape,
        *,
        multi_shot_rope_offset: float,
        seed: int,
        layout: FrameLayout,
        rank: int,
        frame_shape: tuple[int, int, int],
    ):
        self.scheduler, self.settings, self.shape, self.seed = scheduler, settings, shape, seed
        self.multi_shot_rope_offset, self.layout, self.rank = multi_shot_rope_offset, layout, rank
        self.frame_shape = frame_shape

    def draw(self, sample_ids: list[int], step: int, purpose: Purpose) -> RolloutDraws:
        """
        Draw all that is random about a batch of roll-outs.

        Args:
            sample_ids: The ids of the samples in the run.
            step: The update that it is for.
            purpose: What it is for.
        """
        settings = self.settings
        exit_draw, image_draw = np.random.default_rng([self.seed, step, purpose]).random(2)
        last = settings.num_inference_steps - 1
        noise, score_noise, timesteps = zip(
            *(self._draw_sample(sample_id, purpose) for sample_id in sample_ids), strict=True
        )
        return RolloutDraws(
            noise=torch.stack(noise),
            score_noise=torch.stack(score_noise),
            score_timestep=torch.stack(timesteps),
            exit_step=last if settings.last_step_only else int(exit_draw * settings.num_inference_steps),
            uses_image=bool(image_draw < settings.image_probability),
        )

    def _draw_sample(self, sample_id: int, purpose: Purpose) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        channels, height, width = self.frame_shape
        rng, shape, settings = np.random.default_rng([self.seed, sample_id, purpose]), self.shape, self.settings
        table = self.scheduler.training_timesteps
        index = torch.from_numpy(rng.integers(len(table), size=shape.scored_frames // shape.chunk_size))
        if settings.score_timestep == "clip":
            index = index[:1].expand_as(index)
        timestep = table[index].clamp(settings.min_score_timestep, settings.max_score_timestep)
        noise, score_noise = (
            torch.from_numpy(rng.standard_normal((channels, frames, height, width), dtype=np.float32))
            for frames in (shape.num_frames, shape.scored_frames)
        )
        return noise, score_noise, timestep.repeat_interleave(shape.chunk_size)

    def score_inputs(self, video: torch.Tensor, draws: RolloutDraws, plan: ChunkPlan) -> ScoreInputs:
        """
        Noise a roll-out, and return what the scores are shown of it: this rank's frames.

        Args:
            video: The clean latents of the whole roll-out, detached, `[B, C, F, h, w]`.
            draws: The draws of the roll-out.
            plan: What the roll-out was conditioned on.
        """
        shape, layout, rank, device = self.shape, self.layout, self.rank, video.device
        scored = layout.shard_latents(video[:, :, shape.num_frames - shape.scored_frames :], rank)
        noise = layout.shard_latents(draws.score_noise.to(device), rank)
        timestep = layout.shard_frames(draws.score_timestep, rank).to(device).clone()
        noisy = self.scheduler.add_noise(scored, noise, timestep)
        bears_loss = torch.ones_like(timestep, dtype=torch.bool)
        # A frame that was given is given to the scores as well, if this rank has it.
        if plan.first_frame is not None and shape.first_scored_chunk == 0 and rank == 0:
            noisy[:, :, 0], timestep[:, 0], bears_loss[:, 0] = scored[:, :, 0], 0, False
        shots = torch.tensor(plan.shot_index[shape.first_scored_chunk :]).T  # [B, scored chunks]
        shots = (shots - shots[:, :1]).repeat_interleave(shape.chunk_size, dim=1)
        positions = torch.arange(shape.scored_frames) + self.multi_shot_rope_offset * shots
        sees_clean = self.settings.sees_clean_history and layout.num_chunks > 1  # a single chunk has no history
        return ScoreInputs(
            {
                "hidden_states": noisy,
                "timestep": timestep,
                "frame_positions": layout.shard_frames(positions, rank),
                "clean_hidden_states": scored if sees_clean else None,
            },
            scored,
            noise,
            bears_loss,
        )

    def prompts_of_scores(self, plan: ChunkPlan) -> torch.Tensor:
        """Return the prompt embeddings of this rank's chunks, `[B, chunks, L, D]`."""
        embeds = torch.stack(list(plan.prompt_embeds[self.shape.first_scored_chunk :]), dim=1)
        return self.layout.shard_chunks(embeds, self.rank)

    def scored_with_loss(self, plan: ChunkPlan) -> int:
        """Return how many of the frames that this rank scores bear loss, in all videos."""
        given = plan.first_frame is not None and self.shape.first_scored_chunk == 0 and self.rank == 0
        return plan.num_videos * (self.layout.frames_per_rank - given)

    def differentiated_with_loss(self, plan: ChunkPlan, chunks: Sequence[int]) -> int:
        """Return how many frames of these chunks bear the generator's loss, in all videos."""
        given = plan.first_frame is not None and 0 in chunks
        return plan.num_videos * (len(chunks) * self.shape.chunk_size - given)

    def predicted_x0(self, velocity: torch.Tensor, inputs: ScoreInputs) -> torch.Tensor:
        """Return the clean video that a score's velocity points to, `[B, C, F, h, w]`, float64."""
        noisy, timestep = inputs.arguments["hidden_states"], inputs.arguments["timestep"]
        assert noisy is not None and timestep is not None
        return self.scheduler.x0(noisy.double(), velocity, timestep)

    def direction(self, fake_x0: torch.Tensor, real_x0: torch.Tensor, inputs: ScoreInputs) -> torch.Tensor:
        """
        Return the gradient of the generator's loss with respect to each element of its video, before it is divided by
        their number: the difference of the scores, divided by the mean distance of the video from what the teacher
        takes it for, of each chunk. It is 0 in frames that were given.

        Args:
            fake_x0, real_x0: The clean videos that the fake and the real score see, float64 `[B, C, F, h, w]`.
            inputs: What they were shown.

        Returns:
            Float64, `[B, C, F, h, w]`.
        """
        size = self.shape.chunk_size
        mask = inputs.bears_loss[:, None, :, None, None].double()
        difference, distance = fake_x0 - real_x0, (inputs.x0.double() - real_x0).abs()
        by_chunk = (distance * mask).unflatten(2, (-1, size)).sum(dim=(1, 3, 4, 5))
        elements = mask.expand_as(distance).unflatten(2, (-1, size)).sum(dim=(1, 3, 4, 5))
        norm = (by_chunk / elements.clamp(min=1)).repeat_interleave(size, dim=1)[:, None, :, None, None]
        return torch.nan_to_num(difference / norm * mask)

    def generator_loss_sum(
        self, chunks: Sequence[torch.Tensor], direction: torch.Tensor, differentiated: Sequence[int]
    ) -> torch.Tensor:
        """
        Return the sum over frames of the generator's loss: half the mean square of what the video is to be moved by,
        as a function whose gradient with respect to the video is `direction`, divided by the elements of a frame.

        Args:
            chunks: All chunks of the roll-out, `[B, C, chunk_size, h, w]`.
            direction: From [`direction`], of all scored frames.
            differentiated: The chunks whose gradient this process computes, by index.
        """
        directions = direction.split(self.shape.chunk_size, dim=2)
        video = torch.cat([chunks[index] for index in differentiated], dim=2).double()
        by = torch.cat([directions[index - self.shape.first_scored_chunk] for index in differentiated], dim=2)
        target = (video - by).detach()
        return 0.5 * (video - target).square().mean(dim=(1, 3, 4)).sum()

    def critic_error_sum(self, velocity: torch.Tensor, inputs: ScoreInputs) -> torch.Tensor:
        """Return the sum over the frames of the mean squared error of the fake score's velocity; the critic's loss is
        this sum divided by the number of frames that bear loss."""
        target = self.scheduler.velocity(inputs.x0, inputs.noise)
        per_frame = (velocity.float() - target).square().mean(dim=(1, 3, 4))
        return (per_frame * inputs.bears_loss).sum()


def guided(conditional: torch.Tensor, negative: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return a prediction under classifier-free guidance, `neg + s (cond - neg)`, in float64."""
    if negative is None:
        return conditional.double()
    return negative.double() + scale * (conditional.double() - negative.double())
