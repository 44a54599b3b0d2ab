"""Distil LongLive-2.0 to 4 or 2 steps by distribution matching (DMD, arXiv 2605.18739), with accelerate.

    accelerate launch --config_file training/configs/one_gpu.yaml training/train_dmd.py \\
        --config training/configs/longlive2_dmd4.yaml --pretrained_model_name_or_path runs/ar \\
        --prompts prompts.jsonl --output_dir runs/dmd4

Read `train` from top to bottom. Its parts are in the folders next to this file, and most of them are shared with
`train_ar.py`: `objectives/rollout.py` makes the generator's videos, `objectives/distillation.py` defines what the
scores see and the losses, and `objectives/distillation_networks.py` holds generator, fake score and real score: one
network with two LoRAs.

Every step updates the fake score (the critic); every n-th step updates the generator before that, on the same prompts.
The losses of an update are means over all frames that bear loss in the whole batch, over all processes. So a run has
the same losses and gradients however it is distributed.
"""

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model, set_seed
from diffusers.training_utils import EMAModel
from peft.helpers import disable_input_dtype_casting
from tqdm.auto import tqdm

from data.loading import ClipShape, batches, clip_shape
from data.prompt_dataset import PromptDataset
from data.prompt_loading import open_prompts
from data.text_encoder import text_encoder_of
from longlive_diffusers.parallel import FrameLayout, check_heads
from longlive_diffusers.pipelines.chunk_step import is_guided
from objectives.distillation import (
    Distillation,
    DistillationSettings,
    Purpose,
    RolloutDraws,
    RolloutShape,
    ScoreInputs,
    guided,
)
from objectives.distillation_networks import DistillationNetworks, Role
from objectives.rollout import ChunkPlan, RolloutCaches, roll_out
from run.agreement import on_main_process
from run.averaging import average_of, free_gathered
from run.cached_prompts import CachedPromptsPipeline, texts_of
from run.checkpoints import Checkpoints, Stateful, check_steps, resolve_checkpoint, saved_in
from run.distillation_arguments import DistillationArguments, parse_distillation_arguments
from run.distillation_result import DistilledNetwork, save_distilled
from run.distillation_start import build_networks
from run.gradients import average_gradients
from run.history import Setting, SettingsHistory
from run.identity import common_identity, settings_in
from run.interruption import StopRequest, end_early, end_with_result
from run.log import LOG_FILE, TrainingLog, check_tracker
from run.network import check_attention_backend
from run.optimizers import build_optimizers, build_schedules, check_optimizer
from run.output_folder import output_folder
from run.precision import compute_dtype
from run.process_mesh import ProcessMesh, build_process_mesh
from run.processes import build_accelerator
from run.publishing import make_repository, publish
from run.saving import GENERATION, generation_settings, load_start, save_or_checkpoint
from run.script import run_script
from run.states import EMAState, OptimizerState, TrainedWeights
from run.validation import Validation


logger = logging.getLogger("train_dmd")


def main(arguments: DistillationArguments) -> None:
    """Run the distillation that is asked for, alone in its folder; see `train`."""
    output = arguments.run.output
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    check_tracker(arguments.run.report_to)
    accelerator = build_accelerator(arguments.run)  # what is accumulated, `Trainer` does itself
    check_precision(accelerator)
    set_seed(arguments.optimization.seed)
    with output_folder(accelerator, output):
        train(accelerator, arguments, output)


def train(accelerator: Accelerator, arguments: DistillationArguments, output: Path) -> None:
    """
    Distil, save the result, and publish it if that is asked for.

    Raises:
        ValueError: If something that was asked for is not possible; before training.
        SystemExit: After a signal asked the run to end, with the shells' status for it.
    """
    model_args, data_args, run_args = arguments.model, arguments.data, arguments.run
    settings, optimization = arguments.distillation, arguments.optimization

    # 1. What can be checked without loading anything: processes, the checkpoint to resume, the Hub.
    mesh = build_process_mesh(accelerator, optimization.sp_size)  # which processes share a video
    check_optimizer(accelerator, optimization)
    check_attention_backend(accelerator, optimization)
    resumed = resolve_checkpoint(accelerator, output, run_args.resume_from_checkpoint)
    repo_id = run_args.repo_name
    if run_args.push_to_hub:
        repo_id = on_main_process(accelerator, lambda: make_repository(run_args))

    # 2. The networks. Weights that are not trained need not be in float32.
    dtype = compute_dtype(accelerator)
    start_dtype = torch.float32 if model_args.rank is None else dtype
    pipe, transformer = load_start(model_args, start_dtype, **generation_settings(settings))
    size = clip_shape(data_args, pipe, transformer)
    shape = RolloutShape.of(settings, size.num_latent_frames, size.chunk_size)
    layout = FrameLayout(shape.scored_frames, mesh.sp_size, shape.chunk_size)
    check_heads(transformer.config.num_attention_heads, mesh.sp_size)
    check_gradient_chunks(shape, mesh.sp_size)
    caches = rollout_caches(settings, pipe.config, dtype)
    caches.check(transformer)
    validation = Validation(
        run_args,
        pipe,
        transformer,
        size=(size.height, size.width),
        num_latent_frames=shape.num_frames,
        fps=data_args.fps,
        output=output,
        kv_cache_dtype=caches.dtype,
    )
    networks = build_networks(transformer, model_args, optimization, frozen_dtype=dtype)

    # 3. Data: prompts are encoded once, then read.
    cache = Path(data_args.data_cache_dir or output / "cache")
    encoder = text_encoder_of(model_args, data_args.max_sequence_length, accelerator, pipe.tokenizer)
    negative_prompt = settings.negative_prompt or ""
    others = [negative_prompt, *texts_of(run_args.validation_prompts, pipe.config.scene_cut_prefix)]
    dataset, texts = open_prompts(accelerator, data_args, size, pipe, encoder, others, cache, output)
    pipe.texts = texts
    del encoder  # training needs none
    if accelerator.is_main_process and (cut_short := dataset.cut_short):
        logger.warning(
            "%d of %d videos have shots that do not fit into %d chunks and are not made, for instance '%s'",
            *(len(cut_short), len(dataset), shape.num_chunks, cut_short[0]),
        )
    check_rewrites(accelerator, dataset, caches, shape)
    logger.info("%d videos to make, of %d latent frames", len(dataset), shape.num_frames)

    # 4. Optimizers, of networks that FSDP has sharded, or that each process has whole.
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.set_auto_wrap_policy(networks)
        networks = fsdp2_prepare_model(accelerator, networks)
    else:
        networks.to(accelerator.device)
    generator_options, critic_options = arguments.generator_optimization, arguments.critic_optimization
    generator_optimizers, critic_optimizers = (
        build_optimizers(list(networks.parameters_of(role).values()), accelerator, options)
        for role, options in ((Role.GENERATOR, generator_options), (Role.FAKE_SCORE, critic_options))
    )
    generator_parameters = list(networks.parameters_of(Role.GENERATOR).values())
    ema = average_of(generator_parameters, optimization)

    # 5. The objective.
    objective = Distillation(
        pipe.scheduler,
        settings,
        shape,
        multi_shot_rope_offset=pipe.config.multi_shot_rope_offset,
        seed=optimization.seed,
        layout=layout,
        rank=mesh.sp_rank,
        frame_shape=frame_shape(pipe, size),
    )
    trainer = Trainer(accelerator, networks, objective, mesh, caches, texts.load(negative_prompt))

    # 6. The state of the run: its checkpoint and log, its position in the data and in the learning-rate schedules.
    history = SettingsHistory(settings_of(arguments, accelerator, size, shape, pipe.config, caches))
    states, shared_states = checkpoint_states(
        networks, {Role.GENERATOR: generator_optimizers, Role.FAKE_SCORE: critic_optimizers}, ema
    )
    checkpoints = Checkpoints(
        accelerator,
        output,
        states=states,
        shared_states=shared_states | {"settings": history},
        total_limit=run_args.checkpoints_total_limit,
        identity=run_identity(arguments, shape, size, mesh, len(dataset)),
    )
    first_step = 0
    if resumed is not None:
        first_step = checkpoints.load(resumed)
        check_steps(resumed, first_step, optimization.max_train_steps, output)
        for change in history.resume(first_step) if accelerator.is_main_process else ():
            logger.info("resumed with other settings: %s", change)
    generator_schedules = build_schedules(
        generator_optimizers, generator_options, arguments.generator_updates(first_step)
    )
    critic_schedules = build_schedules(critic_optimizers, critic_options, first_step)
    log = TrainingLog(output / LOG_FILE, first_step) if accelerator.is_main_process else None
    if run_args.report_to is not None:
        accelerator.init_trackers(run_args.tracker_name)
    accumulation = optimization.gradient_accumulation_steps
    loader = batches(
        dataset,
        mesh,
        batch_size=optimization.train_batch_size,
        num_workers=data_args.dataloader_num_workers,
        seed=optimization.seed,
        start_batch=first_step * accumulation,
    )
    result = DistilledNetwork(networks, ema, model_args, dtype)

    # 7. Training.
    bar = tqdm(
        range(first_step, optimization.max_train_steps),
        initial=first_step,
        total=optimization.max_train_steps,
        desc="Distilling",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    stop = StopRequest(accelerator)
    saved_step, shown = saved_in(output, resumed, first_step), {}
    with stop:
        for step in bar:
            fetched = stop.unless_requested(lambda: [next(loader) for _ in range(accumulation)])
            if signal_number := stop.agreed():
                if saved_step < step:
                    checkpoints.save(step)
                bar.close()
                end_early(accelerator, signal_number, step, optimization.max_train_steps)
            # What torch itself draws (stochastic rounding in NVFP4) depends on the seed and the step.
            step_seed = optimization.seed * 1_000_003 + step
            torch.manual_seed(step_seed * accelerator.num_processes + accelerator.process_index)
            entry: dict[str, float | int] = {"step": step + 1}
            if step % settings.generator_interval == 0:
                entry["generator_loss"] = trainer.differentiate_generator(fetched, step)
                entry["generator_gradient_norm"] = trainer.apply(
                    Role.GENERATOR, generator_optimizers, optimization.max_grad_norm
                )
                entry["generator_learning_rate"] = generator_schedules[0].get_last_lr()[0]
                for schedule in generator_schedules:
                    schedule.step()
                if ema is not None:
                    ema.step(generator_parameters)
            entry["critic_loss"] = trainer.differentiate_critic(fetched, step)
            entry["critic_gradient_norm"] = trainer.apply(
                Role.FAKE_SCORE, critic_optimizers, optimization.max_grad_norm
            )
            entry["critic_learning_rate"] = critic_schedules[0].get_last_lr()[0]
            for schedule in critic_schedules:
                schedule.step()

            accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=step + 1)
            if log is not None:
                log.write(entry)
            shown |= {name: f"{entry[name]:.4f}" for name in ("generator_loss", "critic_loss") if name in entry}
            bar.set_postfix(shown)

            done = step + 1
            if done % run_args.checkpointing_steps == 0:
                checkpoints.save(done)
                saved_step = done
            if done < optimization.max_train_steps and validation.is_due(done):
                validation.run(accelerator, done, result.for_inference)

    # 8. The result, and only then its videos, which may fail.
    with stop:
        weights = result.weights()
        written = save_or_checkpoint(
            accelerator,
            partial(save_distilled, weights, result, arguments, history, repo_id),
            checkpoints,
            step=optimization.max_train_steps,
            saved_step=saved_step,
        )
        del weights
        if accelerator.is_main_process:
            logger.info("saved to '%s'", output)
        if signal_number := stop.agreed():
            end_with_result(accelerator, signal_number)
    if run_args.validation_prompts:
        validation.run(accelerator, optimization.max_train_steps, result.for_inference)
    if accelerator.is_main_process and run_args.push_to_hub:
        publish(written, repo_id, run_args)
    accelerator.end_training()


class Trainer:
    """
    The two updates of a step: of the generator, and of the fake score.

    Args:
        accelerator: The accelerator of the run.
        networks: The networks.
        objective: What they are shown, and the losses.
        mesh: The groups of processes that share a video.
        caches: The settings of the roll-outs' KV caches.
        negative_embeds: The embeddings of the teacher's negative prompt, `[L, D]`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        networks: DistillationNetworks,
        objective: Distillation,
        mesh: ProcessMesh,
        caches: RolloutCaches,
        negative_embeds: torch.Tensor,
    ):
        self.accelerator, self.networks, self.objective = accelerator, networks, objective
        self.mesh, self.caches, self.negative_embeds = mesh, caches, negative_embeds.to(accelerator.device)

    def differentiate_generator(self, fetched: list[dict], step: int) -> float:
        """Add the gradients of the generator's loss on the batches of an update, and return that loss."""
        objective, mesh = self.objective, self.mesh
        # The processes that share a video make all of it, and share its chunks: each differentiates some of them.
        own = list(objective.shape.with_gradient)[mesh.sp_rank :: mesh.sp_size]
        rollouts = [self._prepare(batch, step, Purpose.GENERATOR) for batch in fetched]
        count = self._total(sum(objective.differentiated_with_loss(rollout.plan, own) for rollout in rollouts))
        total = torch.zeros((), device=self.accelerator.device)
        for rollout in rollouts:
            chunks = self._roll_out(rollout, differentiated=own)
            inputs = objective.score_inputs(detached(chunks), rollout.draws, rollout.plan)
            direction = self._whole(self._direction(inputs, rollout.plan))
            loss_sum = objective.generator_loss_sum(chunks, direction, own)
            with self._using(Role.GENERATOR):  # checkpoints compute forwards again
                self.accelerator.backward(loss_sum * self.accelerator.num_processes / count)
            total += loss_sum.detach()
        return self._mean(total, count, Role.GENERATOR)

    def differentiate_critic(self, fetched: list[dict], step: int) -> float:
        """Add the gradients of the fake score's loss on the batches of an update, and return that loss."""
        objective = self.objective
        rollouts = [self._prepare(batch, step, Purpose.CRITIC) for batch in fetched]
        count = self._total(sum(objective.scored_with_loss(rollout.plan) for rollout in rollouts))
        total = torch.zeros((), device=self.accelerator.device)
        for rollout in rollouts:
            with torch.no_grad():
                chunks = self._roll_out(rollout)
            inputs = objective.score_inputs(detached(chunks), rollout.draws, rollout.plan)
            with self._using(Role.FAKE_SCORE) as fake_score:
                velocity = self._score(fake_score, inputs, objective.prompts_of_scores(rollout.plan))
                error_sum = objective.critic_error_sum(velocity, inputs)
                self.accelerator.backward(error_sum * self.accelerator.num_processes / count)
            total += error_sum.detach()
        return self._mean(total, count, Role.FAKE_SCORE)

    def apply(self, role: Role, optimizers: list[torch.optim.Optimizer], max_grad_norm: float) -> float:
        """Update the weights of a role by its gradients, and forget these; return their norm before clipping."""
        parameters = list(self.networks.parameters_of(role).values())
        average_gradients(self.accelerator, parameters)
        free_gathered(self.networks)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"The norm of the gradient of the {role} is {norm}: lower the learning rates (--learning_rate, "
                "--critic_learning_rate), or look at the prompts of this step."
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    @contextmanager
    def _using(self, role: Role) -> Iterator[Any]:
        """Use the network of a role, see `DistillationNetworks.using`. Under autocast, which converts what a LoRA
        multiplies, PEFT's own conversion of all its inputs to float32 would only take memory."""
        is_mixed = self.accelerator.mixed_precision != "no"
        with self.networks.using(role) as network, disable_input_dtype_casting(self.networks, active=is_mixed):
            yield network

    def _prepare(self, batch: dict, step: int, purpose: Purpose) -> "Rollout":
        draws = self.objective.draw(batch["sample_id"].tolist(), step, purpose)
        plan = ChunkPlan.of_batch(batch, self.accelerator.device, uses_image=draws.uses_image)
        # Where one process rewrites history, all run the forwards of that: under FSDP, these have to be the same.
        rewrites = torch.tensor(plan.rewrites, dtype=torch.float32, device=self.accelerator.device)
        rewrites = self.accelerator.reduce(rewrites, "sum")
        return Rollout(replace(plan, rewrites=(rewrites > 0).tolist()), draws)

    def _roll_out(self, rollout: "Rollout", differentiated: Sequence[int] = ()) -> list[torch.Tensor]:
        noise = rollout.draws.noise.to(self.accelerator.device)
        kv_cache = self.caches.create(self.networks.network(Role.GENERATOR), noise)
        with self._using(Role.GENERATOR) as generator, self.accelerator.autocast():
            return roll_out(
                generator,
                self.objective.scheduler,
                noise,
                rollout.plan,
                kv_cache,
                num_inference_steps=self.objective.settings.num_inference_steps,
                exit_step=rollout.draws.exit_step,
                multi_shot_rope_offset=self.objective.multi_shot_rope_offset,
                differentiated=differentiated,
            )

    @torch.no_grad()
    def _direction(self, inputs: ScoreInputs, plan: ChunkPlan) -> torch.Tensor:
        """Return where the scores move this rank's frames, float64 `[B, C, F, h, w]`."""
        objective, prompts = self.objective, self.objective.prompts_of_scores(plan)
        with self._using(Role.FAKE_SCORE) as fake_score:
            fake = self._score(fake_score, inputs, prompts)
        with self._using(Role.REAL_SCORE) as real_score:
            real, negative = self._score(real_score, inputs, prompts), None
            if is_guided(objective.settings.score_guidance_scale):
                negative_prompt = self.negative_embeds.to(prompts).expand(prompts.shape[0], -1, -1)
                negative = self._score(real_score, inputs, negative_prompt)
        real = guided(real, negative, objective.settings.score_guidance_scale)
        return objective.direction(objective.predicted_x0(fake, inputs), objective.predicted_x0(real, inputs), inputs)

    def _score(self, score, inputs: ScoreInputs, prompts: torch.Tensor) -> torch.Tensor:
        """Return the velocity that a score predicts for this rank's frames."""
        with self.accelerator.autocast():
            return score(**inputs.arguments, encoder_hidden_states=prompts, sp_mesh=self.mesh.sp, return_dict=False)[0]

    def _whole(self, direction: torch.Tensor) -> torch.Tensor:
        """Return the frames of all processes that share a video."""
        if self.mesh.sp is None:
            return direction
        parts = [torch.empty_like(direction) for _ in range(self.mesh.sp_size)]
        torch.distributed.all_gather(parts, direction.contiguous(), group=self.mesh.sp.get_group())
        return torch.cat(parts, dim=2)

    def _total(self, count: int) -> torch.Tensor:
        """Return the number of frames in all processes."""
        own = torch.tensor(float(count), device=self.accelerator.device)
        return self.accelerator.reduce(own, "sum").clamp(min=1)

    def _mean(self, total: torch.Tensor, count: torch.Tensor, role: Role) -> float:
        """Return the loss of the whole batch."""
        loss = (self.accelerator.reduce(total, "sum") / count).item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss of the {role} is {loss}: lower the learning rates (--learning_rate, "
                "--critic_learning_rate), or look at the prompts of this step."
            )
        return loss


@dataclass(frozen=True)
class Rollout:
    """What a roll-out is made of."""

    plan: ChunkPlan
    draws: RolloutDraws


def rollout_caches(settings: DistillationSettings, pipeline: Mapping[str, Any], dtype: torch.dtype) -> RolloutCaches:
    """Return the caches of roll-outs: those of the pipeline, stored as the settings say."""
    sizes = {name: pipeline[name] for name in ("window_size", "sink_size", "multi_shot_sink")}
    return RolloutCaches(**sizes, dtype=dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype)


def detached(chunks: list[torch.Tensor]) -> torch.Tensor:
    """Return the video of a roll-out, `[B, C, F, h, w]`, without its graph."""
    return torch.cat([chunk.detach() for chunk in chunks], dim=2)


def frame_shape(pipe: CachedPromptsPipeline, size: ClipShape) -> tuple[int, int, int]:
    """Return the shape of a latent frame, `(C, h, w)`."""
    scale = pipe.vae_scale_factor_spatial
    return pipe.vae.config.z_dim, size.height // scale, size.width // scale


def check_precision(accelerator: Accelerator) -> None:
    """Raise a ValueError for float16, whose gradients would have to be scaled."""
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision fp16 is not possible in distillation: choose bf16 in accelerate's configuration"
        )


def check_gradient_chunks(shape: RolloutShape, sp_size: int) -> None:
    """Raise a ValueError unless every process that shares a video differentiates as many of its chunks."""
    if shape.gradient_chunks % sp_size:
        raise ValueError(
            f"{shape.gradient_chunks} chunks with a gradient (--gradient_chunks) cannot be shared by {sp_size} "
            "processes (--sp_size): it does not divide them"
        )


def check_rewrites(
    accelerator: Accelerator, dataset: PromptDataset, caches: RolloutCaches, shape: RolloutShape
) -> None:
    """Raise a ValueError if processes that FSDP ties together might rewrite different numbers of chunks at a prompt
    switch: where frames are evicted, each video has cached others, by its own shots."""
    evicts = caches.window_size < shape.num_frames
    if accelerator.is_fsdp2 and evicts and dataset.has_switches:
        raise ValueError(
            f"With FSDP, prompts that switch within a shot need a window of the whole roll-out: --window_size is "
            f"{caches.window_size}, --num_latent_frames {shape.num_frames}"
        )


def checkpoint_states(
    networks: DistillationNetworks, optimizers: dict[Role, list[torch.optim.Optimizer]], ema: EMAModel | None
) -> tuple[dict[str, Stateful], dict[str, Stateful]]:
    """Return what a checkpoint holds, by name: the states that each process has of its own, and those that are the
    same in all processes. Weights that are not trained are not in it."""
    states: dict[str, Stateful] = {}
    is_sharded = False
    for role, of_role in optimizers.items():
        weights = TrainedWeights(networks.parameters_of(role))
        states[role.value], is_sharded = weights, is_sharded or weights.is_sharded
        states |= {f"{role.value} optimizer {index}": OptimizerState(own) for index, own in enumerate(of_role)}
    if ema is not None:
        states["ema"] = EMAState(ema)
    return (states, {}) if is_sharded else ({}, states)


def run_identity(
    arguments: DistillationArguments, shape: RolloutShape, size: ClipShape, mesh: ProcessMesh, num_samples: int
) -> dict[str, Setting]:
    """Return what must not change when a run is resumed."""
    settings = arguments.distillation
    return {
        "stage": "distillation",
        **common_identity(arguments.model, arguments.optimization, mesh, num_samples),
        **asdict(size),
        "score_latent_frames": shape.scored_frames,
        "gradient_chunks": shape.gradient_chunks,
        "num_inference_steps": settings.num_inference_steps,
        "start": settings.start,
        "generator_interval": settings.generator_interval,
        "image_conditioning": arguments.data.image_conditioning,
    }


def settings_of(
    arguments: DistillationArguments,
    accelerator: Accelerator,
    size: ClipShape,
    shape: RolloutShape,
    pipeline: Mapping[str, Any],
    caches: RolloutCaches,
) -> dict[str, Setting]:
    """Return all settings that the result depends on."""
    groups = (arguments.model, arguments.data, arguments.distillation, arguments.optimization)
    resolved = {name: pipeline[name] for name in GENERATION} | {
        "kv_cache_dtype": str(caches.dtype).removeprefix("torch."),
        "score_latent_frames": shape.scored_frames,
        "gradient_chunks": shape.gradient_chunks,
    }
    return settings_in(groups, accelerator) | asdict(size) | resolved


def run(argv: list[str]) -> int:
    """Run the script, and return its exit status; see `run_script`."""
    return run_script("train_dmd.py", argv, lambda words: main(parse_distillation_arguments(words)))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
