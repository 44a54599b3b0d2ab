"""Make videos during training, with the current weights (or with their average, if one is kept)."""

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from longlive_diffusers import VideoWriter, pixel_frames
from run.arguments import RunArguments
from run.averaging import averaged_weights
from run.cached_prompts import CachedPromptsPipeline, Texts, split_shots


logger = logging.getLogger("validation")


class Validation:
    """
    Args:
        arguments: The prompts, and how and when videos are made.
        pipe: The run's pipeline, without a transformer.
        texts: The run's text cache, which has all texts of the prompts.
        num_latent_frames: The length of the training clips, by default also that of the videos.
        output: The run's folder; videos are written to `validation/step-N/`.
    """

    def __init__(
        self,
        arguments: RunArguments,
        pipe: CachedPromptsPipeline,
        texts: Texts,
        num_latent_frames: int,
        output: Path,
    ):
        self.arguments, self.pipe, self.output = arguments, pipe, output
        self.pipe.texts = texts
        self.num_frames = arguments.validation_num_frames or pixel_frames(num_latent_frames)

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to make videos after update `step`."""
        if not self.arguments.validation_prompts:
            return False
        return step % self.arguments.validation_steps == 0 or step == last_step

    @torch.no_grad()
    def run(self, accelerator: Accelerator, model: torch.nn.Module, ema: EMAModel | None, step: int) -> None:
        """Make one video for each prompt. Every process has to call this: all of them gather sharded weights."""
        if accelerator.is_main_process or accelerator.is_fsdp2:
            self._make_videos(accelerator, model, ema, step)
        accelerator.wait_for_everyone()

    def _make_videos(self, accelerator: Accelerator, model: torch.nn.Module, ema: EMAModel | None, step: int) -> None:
        transformer = accelerator.unwrap_model(model, keep_torch_compile=False)
        random_state = torch.get_rng_state()  # what is drawn here must not change the run
        vae, vae_device = self.pipe.vae, self.pipe.vae.device
        with averaged_weights(model, ema):
            self.pipe.transformer = transformer.eval()
            try:
                vae.to(accelerator.device)
                for index, prompt in enumerate(self.arguments.validation_prompts):
                    self._make_video(accelerator, index, prompt, step)
            finally:
                self.pipe.transformer = None
                transformer.train()
                vae.to(vae_device)
                torch.set_rng_state(random_state)

    def _make_video(self, accelerator: Accelerator, index: int, prompt: str, step: int) -> None:
        shots = split_shots(prompt)
        with accelerator.autocast():
            frames = self.pipe(
                **({"prompt": shots[0]} if len(shots) == 1 else {"shot_prompts": shots}),
                num_frames=self.num_frames,
                num_inference_steps=self.arguments.validation_num_inference_steps,
                guidance_scale=self.arguments.validation_guidance_scale,
                generator=torch.Generator().manual_seed(index),
                max_sequence_length=self.pipe.texts.max_sequence_length,
                # The keys and values that the network computes, which has float32 weights, are in bfloat16.
                kv_cache_dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None,
                # Where weights are sharded, all processes have to run the network, but one decodes.
                output_type="np" if accelerator.is_main_process else "latent",
            ).frames[0]
        if not accelerator.is_main_process:
            return
        folder = self.output / "validation" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        with VideoWriter(folder / f"{index}.mp4") as writer:
            writer.write(frames)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                # First, middle and last frame: a video would need moviepy.
                moments = frames[[0, len(frames) // 2, -1]]
                tracker.writer.add_images(f"validation {index}: {prompt}", moments, step, dataformats="NHWC")
