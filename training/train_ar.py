"""Teacher-forcing training of LongLive-2.0, its AR stage (arXiv 2605.18739), under accelerate.

    accelerate launch --config_file training/configs/one_gpu.yaml training/train_ar.py \\
        --config training/configs/longlive2_ar.yaml \\
        --pretrained_model_name_or_path Wan-AI/Wan2.2-TI2V-5B-Diffusers --train_data_dir videos --output_dir runs/ar

Read `main` from top to bottom. The parts that it names are beside it: the data in `data.py` and `training_data.py`,
what the network is shown in `objectives.py`, checkpoints in `checkpoints.py`, options in `train_arguments.py`.

The loss of an update is the mean over all frames that bear loss in the whole batch - of all processes, whether they
share clips or have clips of their own, and of all batches that are accumulated. So the same run gives the same numbers
however it is spread.
"""

import logging
import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from run.checkpoints import Checkpoints, remove_partial, resolve_checkpoint
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from objectives.error_recycling import ErrorRecycler, RecyclingSettings
from run.muon import Muon
from objectives.teacher_forcing import Batch, TeacherForcing, TeacherForcingSettings
from peft import LoraConfig
from run.process_mesh import ProcessMesh, build_process_mesh
from run.saving import load_start, publish, save_result, trained_weights
from tqdm.auto import tqdm
from run.arguments import Arguments, ObjectiveArguments, OptimizationArguments, parse_arguments
from data.loading import ClipShape, batches, encode_batch, open_dataset
from run.log import TrainingLog
from run.validation import Validation

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.nvfp4 import NVFP4Config, nvfp4_layers, quantize_model
from longlive_diffusers.nvfp4.recipes import recipe_named
from longlive_diffusers.nvfp4.training import train_in_nvfp4
from longlive_diffusers.parallel import FrameLayout, check_heads


logger = logging.getLogger("train_ar")


def main(arguments: Arguments) -> None:
    model_args, data_args, run_args = arguments.model, arguments.data, arguments.run
    optimization = arguments.optimization
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

    # 1. Processes: how many there are, and which of them share a clip.
    output = Path(run_args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=optimization.gradient_accumulation_steps,
        log_with=run_args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
    mesh = build_process_mesh(accelerator, optimization.sp_size)
    set_seed(optimization.seed)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        remove_partial(output)
    accelerator.wait_for_everyone()

    # 2. What training starts from.
    pipe, transformer = load_start(model_args)
    shape = clip_shape(arguments, pipe, transformer)
    layout = FrameLayout(shape.num_latent_frames, mesh.sp_size, shape.chunk_size)
    check_heads(transformer.config.num_attention_heads, mesh.sp_size)
    settings = objective_settings(arguments.objective, pipe.config.multi_shot_rope_offset)
    resumed = resolve_checkpoint(output, run_args.resume_from_checkpoint)

    # 3. Data: encoded once, then read.
    cache = Path(data_args.data_cache_dir or output / "cache")
    dataset, texts = open_dataset(accelerator, data_args, shape, pipe, cache, output)
    logger.info("%d clips of %d latent frames", len(dataset), shape.num_latent_frames)

    # 4. Network and optimiser.
    transformer.train()
    if optimization.precision == "nvfp4":
        use_nvfp4(transformer, arguments)
    if model_args.rank is not None:
        add_lora(transformer, arguments)
    if optimization.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if optimization.attention_backend is not None:
        transformer.set_attention_backend(optimization.attention_backend)
    if optimization.compile:
        transformer.compile_repeated_blocks()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(trained, accelerator, optimization)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    # Not prepared: accelerate would step it once for each process, and a step here is an update.
    lr_scheduler = get_scheduler(
        optimization.lr_scheduler,
        optimizer,
        num_warmup_steps=optimization.lr_warmup_steps,
        num_training_steps=optimization.max_train_steps,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = None
    if optimization.ema_decay is not None:
        decay = optimization.ema_decay
        ema = EMAModel(trained, decay=decay, min_decay=decay, update_after_step=optimization.ema_start_step)

    # 5. The objective.
    recycler = error_recycler(arguments.objective, shape.chunk_size) if arguments.objective.error_recycling else None
    objective = TeacherForcing(
        pipe.scheduler,
        settings,
        seed=optimization.seed,
        layout=layout,
        rank=mesh.sp_rank,
        empty_prompt=texts.load(""),
        recycler=recycler,
    )

    # 6. Where the run stands.
    checkpoints = Checkpoints(
        accelerator,
        output,
        lr_scheduler=lr_scheduler,
        ema=ema,
        errors=recycler.buffer if recycler is not None else None,
        total_limit=run_args.checkpoints_total_limit,
        identity=run_identity(arguments, shape, mesh, len(dataset)),
    )
    first_step = checkpoints.load(resumed) if resumed is not None else 0
    log = TrainingLog(output / "training_log.jsonl", first_step) if accelerator.is_main_process else None
    if run_args.report_to is not None:
        accelerator.init_trackers(run_args.tracker_name)
    validation = Validation(run_args, pipe, shape.num_latent_frames, output)
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
    bar = tqdm(
        range(first_step, optimization.max_train_steps),
        initial=first_step,
        total=optimization.max_train_steps,
        desc="Training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    for step in bar:
        # What torch itself draws - LoRA's dropout, the noise of rounding in NVFP4 - is of the seed and the step, too.
        step_seed = optimization.seed * 1_000_003 + step
        torch.manual_seed(step_seed * accelerator.num_processes + accelerator.process_index)
        prepared = []
        for _ in range(accumulation):
            items = next(loader)
            if vae is not None:
                items = encode_batch(items, vae, layout, mesh.sp_rank, data_args.vae_halo, accelerator.device)
            prepared.append(objective.prepare(items, step, accelerator.device))
        loss, gradient_norm = update(
            accelerator, model, optimizer, objective, prepared, mesh, optimization.max_grad_norm
        )
        lr_scheduler.step()
        if ema is not None:
            ema.step(trained)

        entry = {"loss": loss, "gradient_norm": gradient_norm, "learning_rate": lr_scheduler.get_last_lr()[0]}
        accelerator.log(entry, step=step + 1)
        if log is not None:
            log.write({"step": step + 1, **entry})
        bar.set_postfix(loss=f"{loss:.4f}")

        done = step + 1
        if done % run_args.checkpointing_steps == 0:
            checkpoints.save(done)
        if validation.is_due(done, optimization.max_train_steps):
            validation.run(accelerator, model, ema, done)

    # 8. The result.
    weights = trained_weights(accelerator, model, ema)
    if accelerator.is_main_process:
        written = save_result(weights, transformer, arguments, output)
        logger.info("saved to '%s'", output)
        if run_args.push_to_hub:
            publish(written, output, run_args)
    accelerator.end_training()


def update(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: TeacherForcing,
    prepared: list[Batch],
    mesh: ProcessMesh,
    max_grad_norm: float,
) -> tuple[float, float]:
    """
    One update of the weights, from the batches that are accumulated for it.

    Returns:
        The loss of the whole batch, and the norm of its gradient before clipping.
    """
    # DDP and FSDP average gradients over all processes, and accelerate divides by the number of batches: times both,
    # over the frames that count anywhere, the sums of squared errors become their mean.
    count = sum(batch.bears_loss.sum() for batch in prepared).to(accelerator.device, torch.float32)
    count = accelerator.reduce(count, "sum").clamp(min=1)
    scale = accelerator.num_processes * len(prepared) / count
    total, norm = torch.zeros((), device=accelerator.device), None
    for batch in prepared:
        with accelerator.accumulate(model):
            velocity = model(**batch.arguments, sp_mesh=mesh.sp, return_dict=False)[0]
            error_sum = objective.error_sum(velocity, batch)
            accelerator.backward(error_sum * scale)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        total += error_sum.detach()
        objective.keep_errors(velocity.detach(), batch)
    loss = (accelerator.reduce(total, "sum") / count).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"The loss is {loss}: lower the learning rate, or look at the data of this step.")
    return loss, float(norm)


def clip_shape(arguments: Arguments, pipe, transformer: LongLiveTransformer3DModel) -> ClipShape:
    """
    Raises:
        ValueError: Sizes that the VAE or the network does not take, or clips that are not whole chunks.
    """
    data, config = arguments.data, transformer.config
    scale = pipe.vae_scale_factor_spatial
    height = data.height or config.sample_height * scale
    width = data.width or config.sample_width * scale
    units = (scale * config.patch_size[1], scale * config.patch_size[2])
    if height % units[0] or width % units[1]:
        raise ValueError(f"--height and --width must be multiples of {units[0]} and {units[1]}, got {height}x{width}.")
    if data.num_latent_frames % config.chunk_size:
        raise ValueError(
            f"--num_latent_frames {data.num_latent_frames} is no multiple of {config.chunk_size} (chunks)"
        )
    return ClipShape(height, width, data.num_latent_frames, config.chunk_size)


def build_optimizer(
    parameters: list[torch.nn.Parameter], accelerator: Accelerator, options: OptimizationArguments
) -> torch.optim.Optimizer:
    """
    Raises:
        ValueError: Muon with FSDP, which gives no process a whole matrix.
    """
    settings = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.adam_weight_decay,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("--optimizer muon needs whole matrices, and FSDP shards them: use adamw")
    return Muon(parameters, **settings)


def use_nvfp4(transformer: LongLiveTransformer3DModel, arguments: Arguments) -> None:
    """Bring the linear layers of the blocks to 4 bits: in training, all three products of each; under a LoRA, the
    frozen weights."""
    optimization = arguments.optimization
    if arguments.model.rank is None:
        recipe = recipe_named(optimization.nvfp4_recipe)
        layers = train_in_nvfp4(transformer, recipe, optimization.nvfp4_backend)
        logger.info("%d linear layers train in NVFP4, recipe '%s'", len(layers), recipe.name)
    elif not nvfp4_layers(transformer):
        quantize_model(transformer, NVFP4Config())


def add_lora(transformer: LongLiveTransformer3DModel, arguments: Arguments) -> None:
    """Freeze the network, and add a LoRA that is trained in its stead."""
    options = arguments.model
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(
            r=options.rank,
            lora_alpha=options.lora_alpha or options.rank,
            lora_dropout=options.lora_dropout,
            target_modules=options.lora_layers,
            init_lora_weights="gaussian",
        )
    )


def objective_settings(options: ObjectiveArguments, default_offset: float) -> TeacherForcingSettings:
    offset = default_offset if options.multi_shot_rope_offset is None else options.multi_shot_rope_offset
    return TeacherForcingSettings(
        weighting_scheme=options.weighting_scheme,
        image_probability=options.image_probability,
        prompt_dropout=options.prompt_dropout,
        history_noise_probability=options.history_noise_probability,
        history_noise_max_timestep=options.history_noise_max_timestep,
        multi_shot_rope_offset=offset,
    )


def error_recycler(options: ObjectiveArguments, chunk_size: int) -> ErrorRecycler:
    settings = RecyclingSettings(
        clean_probability=options.error_clean_probability,
        context_probability=options.error_context_probability,
        latent_probability=options.error_latent_probability,
        noise_probability=options.error_noise_probability,
        update_probability=options.error_update_probability,
        num_buckets=options.error_num_buckets,
        bucket_size=options.error_bucket_size,
        warmup_steps=options.error_warmup_steps,
    )
    return ErrorRecycler(settings, chunk_size)


def run_identity(arguments: Arguments, shape: ClipShape, mesh: ProcessMesh, num_samples: int) -> dict:
    """What has to be the same for a run to go on exactly; the processes too, each of which has its own part of the
    error buffers and of the random states."""
    optimization = arguments.optimization
    return {
        "seed": optimization.seed,
        "batch": optimization.train_batch_size * mesh.dp_size,
        "gradient_accumulation_steps": optimization.gradient_accumulation_steps,
        "num_latent_frames": shape.num_latent_frames,
        "num_samples": num_samples,
        "rank": arguments.model.rank,
        "optimizer": optimization.optimizer,
        "precision": optimization.precision,
        "nvfp4_recipe": optimization.nvfp4_recipe if optimization.precision == "nvfp4" else None,
        "ema_decay": optimization.ema_decay,
        "error_recycling": arguments.objective.error_recycling,
        "processes": mesh.dp_size * mesh.sp_size,
    }


if __name__ == "__main__":
    main(parse_arguments(sys.argv[1:]))
