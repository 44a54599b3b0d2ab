"""Train the AR stage of LongLive-2.0 (arXiv 2605.18739) by teacher forcing, with accelerate.

    accelerate launch --config_file training/configs/one_gpu.yaml training/train_ar.py \\
        --config training/configs/longlive2_ar.yaml \\
        --pretrained_model_name_or_path Wan-AI/Wan2.2-TI2V-5B-Diffusers --train_data_dir videos --output_dir runs/ar

Read `train` from top to bottom. Its parts are in the folders next to this file: `data/` reads and caches the videos,
`objectives/` defines what the network is shown and what it has to predict, and `run/` holds what every run needs:
options, checkpoints, results.

The loss of an update is the mean over all frames that bear loss in the whole batch: across all processes, whether they
share clips or have clips of their own, and across all accumulated batches. So a run has the same losses and gradients
however it is distributed; what processes draw or collect for themselves differs (the dropout of a LoRA, stochastic
rounding, the errors that are recycled).
"""

import logging
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from data.loading import ClipShape, batches, clip_shape, encode_batch, open_dataset, read_ahead
from data.text_encoder import text_encoder_of
from longlive_diffusers.parallel import FrameLayout, check_heads
from objectives.error_recycling import ErrorRecycler
from objectives.teacher_forcing import PreparedBatch, TeacherForcing
from run.agreement import on_main_process
from run.arguments import Arguments, parse_arguments
from run.averaging import average_of, for_inference
from run.cached_prompts import texts_of
from run.checkpoints import Checkpoints, check_steps, resolve_checkpoint, saved_in
from run.history import Setting, SettingsHistory
from run.identity import common_identity, settings_in
from run.interruption import StopRequest, end_early, end_with_result
from run.log import LOG_FILE, TrainingLog, check_tracker
from run.network import check_attention_backend, prepare_transformer
from run.optimizers import build_optimizers, build_schedules, check_optimizer
from run.output_folder import output_folder
from run.process_mesh import ProcessMesh, build_process_mesh
from run.processes import build_accelerator
from run.publishing import make_repository, publish
from run.saving import generation_settings, load_start, save_or_checkpoint, save_result, trained_weights
from run.script import run_script
from run.states import EMAState
from run.validation import Validation


logger = logging.getLogger("train_ar")


def main(arguments: Arguments) -> None:
    """Run the training that is asked for, alone in its folder; see `train`."""
    optimization, output = arguments.optimization, arguments.run.output
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    check_tracker(arguments.run.report_to)
    accelerator = build_accelerator(arguments.run, optimization.gradient_accumulation_steps)
    set_seed(optimization.seed)
    with output_folder(accelerator, output):
        train(accelerator, arguments, output)


def train(accelerator: Accelerator, arguments: Arguments, output: Path) -> None:
    """
    Train, save the result, and publish it if that is asked for.

    Raises:
        ValueError: If something that was asked for is not possible; before training.
        SystemExit: After a signal asked the run to end, with the shells' status for it.
    """
    model_args, data_args, run_args = arguments.model, arguments.data, arguments.run
    optimization = arguments.optimization

    # 1. What can be checked without loading anything: processes, the checkpoint to resume, the Hub.
    mesh = build_process_mesh(accelerator, optimization.sp_size)  # which processes share a clip
    check_optimizer(accelerator, optimization)
    check_attention_backend(accelerator, optimization)
    resumed = resolve_checkpoint(accelerator, output, run_args.resume_from_checkpoint)
    repo_id = run_args.repo_name
    if run_args.push_to_hub:
        repo_id = on_main_process(accelerator, lambda: make_repository(run_args))

    # 2. The pipeline and the transformer that training starts from.
    pipe, transformer = load_start(model_args, **generation_settings(arguments.objective))
    shape = clip_shape(data_args, pipe, transformer)
    layout = FrameLayout(shape.num_latent_frames, mesh.sp_size, shape.chunk_size)
    check_heads(transformer.config.num_attention_heads, mesh.sp_size)
    validation = Validation(
        run_args,
        pipe,
        transformer,
        size=(shape.height, shape.width),
        num_latent_frames=shape.num_latent_frames,
        fps=data_args.fps,
        output=output,
    )
    prepare_transformer(transformer, model_args, optimization)

    # 3. Data: encoded once, then read.
    cache = Path(data_args.data_cache_dir or output / "cache")
    encoder = text_encoder_of(model_args, data_args.max_sequence_length, accelerator, pipe.tokenizer)
    validation_texts = texts_of(run_args.validation_prompts, pipe.config.scene_cut_prefix)
    dataset, texts = open_dataset(accelerator, data_args, shape, pipe, encoder, validation_texts, cache, output)
    pipe.texts = texts
    del encoder  # training needs none
    logger.info("%d clips of %d latent frames", len(dataset), shape.num_latent_frames)

    # 4. Optimizers.
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    model, *optimizers = accelerator.prepare(transformer, *build_optimizers(trained, accelerator, optimization))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = average_of(trained, optimization)

    # 5. The objective.
    recycling = arguments.recycling
    recycler = ErrorRecycler(recycling, shape.chunk_size) if recycling.error_recycling else None
    objective = TeacherForcing(
        pipe.scheduler,
        arguments.objective,
        multi_shot_rope_offset=pipe.config.multi_shot_rope_offset,
        seed=optimization.seed,
        layout=layout,
        rank=mesh.sp_rank,
        empty_prompt=texts.load(""),
        recycler=recycler,
    )

    # 6. The state of the run: its checkpoint and log, its position in the data and in the learning-rate schedules.
    history = SettingsHistory(settings_of(arguments, accelerator, shape, pipe.config.multi_shot_rope_offset))
    states, shared_states = checkpoint_states(recycler, ema)
    checkpoints = Checkpoints(
        accelerator,
        output,
        states=states,
        shared_states=shared_states | {"settings": history},
        total_limit=run_args.checkpoints_total_limit,
        identity=run_identity(arguments, shape, mesh, len(dataset)),
    )
    first_step = 0
    if resumed is not None:
        first_step = checkpoints.load(resumed)
        check_steps(resumed, first_step, optimization.max_train_steps, output)
        for change in history.resume(first_step) if accelerator.is_main_process else ():
            logger.info("resumed with other settings: %s", change)
    # Not prepared: accelerate would step them once for each process, but here one step is one update.
    schedules = build_schedules(optimizers, optimization, first_step)
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
    vae = None if data_args.cache_latents else pipe.vae.to(accelerator.device)

    # 7. Training.
    steps = range(first_step, optimization.max_train_steps)
    bar = tqdm(
        steps,
        initial=first_step,
        total=optimization.max_train_steps,
        desc="Training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    drawn = ([objective.with_draws(next(loader), step) for _ in range(accumulation)] for step in steps)
    stop = StopRequest(accelerator)
    saved_step = saved_in(output, resumed, first_step)
    with stop, read_ahead(drawn) as updates:
        for step in bar:
            fetched = stop.unless_requested(lambda: next(updates))
            if signal_number := stop.agreed():
                if saved_step < step:
                    checkpoints.save(step)
                bar.close()
                end_early(accelerator, signal_number, step, optimization.max_train_steps)
            # What torch itself draws (LoRA's dropout, stochastic rounding in NVFP4) depends on the seed and the step.
            step_seed = optimization.seed * 1_000_003 + step
            torch.manual_seed(step_seed * accelerator.num_processes + accelerator.process_index)
            prepared = []
            for batch in fetched:
                if vae is not None:
                    batch = encode_batch(batch, vae, layout, mesh.sp_rank, data_args.vae_halo, accelerator.device)
                prepared.append(objective.prepare(batch, step, accelerator.device))
            loss, gradient_norm = update(
                accelerator, model, optimizers, objective, prepared, mesh, optimization.max_grad_norm
            )
            entry = {"loss": loss, "gradient_norm": gradient_norm, "learning_rate": schedules[0].get_last_lr()[0]}
            for schedule in schedules:
                schedule.step()
            if ema is not None:
                ema.step(trained)

            accelerator.log(entry, step=step + 1)
            if log is not None:
                log.write({"step": step + 1, **entry})
            bar.set_postfix(loss=f"{loss:.4f}")

            done = step + 1
            if done % run_args.checkpointing_steps == 0:
                checkpoints.save(done)
                saved_step = done
            if done < optimization.max_train_steps and validation.is_due(done):
                validation.run(accelerator, done, lambda: for_inference(accelerator, model, ema))

    # 8. The result, and only then its videos, which may fail.
    with stop:
        weights = trained_weights(accelerator, model, ema)
        written = save_or_checkpoint(
            accelerator,
            partial(save_result, weights, transformer, arguments, history, repo_id),
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
        validation.run(accelerator, optimization.max_train_steps, lambda: for_inference(accelerator, model, ema))
    if accelerator.is_main_process and run_args.push_to_hub:
        publish(written, repo_id, run_args)
    accelerator.end_training()


def update(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    objective: TeacherForcing,
    prepared: list[PreparedBatch],
    mesh: ProcessMesh,
    max_grad_norm: float,
) -> tuple[float, float]:
    """
    Update the weights once, from the batches that are accumulated for the update.

    Returns:
        The loss of the whole batch, and the norm of its gradient before clipping.
    """
    # DDP and FSDP average gradients over all processes, and accelerate divides the loss by the number of batches.
    # Multiplied by both, and divided by the number of frames that bear loss in any process, the sums of squared errors
    # become their mean.
    count = sum(batch.loss_mask.sum() for batch in prepared).to(accelerator.device, torch.float32)
    count = accelerator.reduce(count, "sum").clamp(min=1)
    scale = accelerator.num_processes * len(prepared) / count
    total, norm = torch.zeros((), device=accelerator.device), None
    # Until the last batch, DDP leaves gradients to each process. FSDP would have to keep them whole, not in shards.
    summed_last = () if accelerator.is_fsdp2 else (model,)
    for batch in prepared:
        with accelerator.accumulate(*summed_last):
            velocity = model(**batch.arguments, sp_mesh=mesh.sp, return_dict=False)[0]
            error_sum = objective.error_sum(velocity, batch)
            accelerator.backward(error_sum * scale)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        total += error_sum.detach()
        objective.keep_errors(velocity.detach(), batch)
    loss = (accelerator.reduce(total, "sum") / count).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"The loss is {loss}: lower the learning rate, or look at the data of this step.")
    gradient_norm = float(norm)
    if not math.isfinite(gradient_norm) and accelerator.scaler is None:  # which passes over such updates, in float16
        raise FloatingPointError(
            f"The norm of the gradient is {gradient_norm}: lower the learning rate, or look at the data of this step."
        )
    return loss, gradient_norm


def checkpoint_states(recycler: ErrorRecycler | None, ema: EMAModel | None) -> tuple[dict, dict]:
    """Return what is saved besides weights and optimizers, by name: the states that each process has of its own, and
    those that are the same in all processes."""
    states = {} if recycler is None else {"errors": recycler.buffer}
    if ema is None:
        return states, {}
    average = EMAState(ema)
    return (states | {"ema": average}, {}) if average.is_sharded else (states, {"ema": average})


def run_identity(arguments: Arguments, shape: ClipShape, mesh: ProcessMesh, num_samples: int) -> dict[str, Setting]:
    """Return what must not change when a run is resumed."""
    recycling = arguments.recycling
    return {
        **common_identity(arguments.model, arguments.optimization, mesh, num_samples),
        **asdict(shape),
        "error_recycling": recycling.error_recycling,
        "error_num_buckets": recycling.error_num_buckets if recycling.error_recycling else None,
        "error_bucket_size": recycling.error_bucket_size if recycling.error_recycling else None,
    }


def settings_of(
    arguments: Arguments, accelerator: Accelerator, shape: ClipShape, rope_offset: float
) -> dict[str, Setting]:
    """Return all settings that the result depends on."""
    groups = (arguments.model, arguments.data, arguments.objective, arguments.recycling, arguments.optimization)
    return settings_in(groups, accelerator) | asdict(shape) | {"multi_shot_rope_offset": rope_offset}


def run(argv: list[str]) -> int:
    """Run the script, and return its exit status; see `run_script`."""
    return run_script("train_ar.py", argv, lambda words: main(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
