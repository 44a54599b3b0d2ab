"""Make videos during training, with the current weights (or with their average, if one is kept)."""

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from longlive_diffusers import LongLivePipeline, VideoWriter, pixel_frames
from run.arguments import RunArguments


logger = logging.getLogger("validation")


class Validation:
    """
    Args:
        arguments: The prompts, and how and when videos are made.
        pipe: The run's pipeline, without a transformer.
        num_latent_frames: The length of the training clips, by default also that of the videos.
        output: The run's folder; videos are written to `validation/step-N/`.
    """

    def __init__(self, arguments: RunArguments, pipe: LongLivePipeline, num_latent_frames: int, output: Path):
        self.arguments, self.pipe, self.output = arguments, pipe, output
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
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if ema is not None:
            ema.store(trained)
            ema.copy_to(trained)
        transformer = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.pipe.transformer = transformer.eval()
        random_state = torch.get_rng_state()  # what is drawn here must not change the run
        helpers = [(part, part.device) for part in (self.pipe.text_encoder, self.pipe.vae)]
        try:
            for part, _ in helpers:
                part.to(accelerator.device)
            for index, prompt in enumerate(self.arguments.validation_prompts):
                self._make_video(accelerator, index, prompt, step)
        finally:
            self.pipe.transformer = None
            transformer.train()
            for part, device in helpers:
                part.to(device)
            torch.set_rng_state(random_state)
            if ema is not None:
                ema.restore(trained)

    def _make_video(self, accelerator: Accelerator, index: int, prompt: str, step: int) -> None:
        shots = [shot.strip() for shot in prompt.split(" | ")]
        with accelerator.autocast():
            frames = self.pipe(
                **({"prompt": shots[0]} if len(shots) == 1 else {"shot_prompts": shots}),
                num_frames=self.num_frames,
                num_inference_steps=self.arguments.validation_num_inference_steps,
                guidance_scale=self.arguments.validation_guidance_scale,
                generator=torch.Generator().manual_seed(index),
                output_type="np",
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
