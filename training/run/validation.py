"""Make videos during training, with the current weights (or with their average, if one is kept)."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from longlive_diffusers import LongLiveTransformer3DModel, VideoWriter, pixel_frames
from run.arguments import RunArguments
from run.cached_prompts import CachedPromptsPipeline, split_shots


logger = logging.getLogger("validation")

# What may happen to one video, and is no reason to end a run; out of memory is a RuntimeError.
FAILURES = (ValueError, ArithmeticError, OSError, RuntimeError)

Network = Callable[[], AbstractContextManager[LongLiveTransformer3DModel]]
"""Opens the network of a run as it is to be used, and gives it back to training."""


class EmptyTexts:
    """Embeddings without meaning, to check calls of a pipeline with before its prompts are encoded."""

    max_sequence_length = 1

    def __init__(self, text_dim: int):
        self.text_dim = text_dim

    def load(self, _: str) -> torch.Tensor:
        return torch.zeros(self.max_sequence_length, self.text_dim)


class Validation:
    """
    Makes the videos of a run. The pipeline's `texts` have to be set before the first ones are made.

    Args:
        arguments: The prompts, and how and when videos are made.
        pipe: The run's pipeline, without a transformer.
        transformer: The network that is trained.
        size: The height and the width of the videos.
        num_latent_frames: The length of the training clips, by default also that of the videos.
        fps: The number of frames per second.
        kv_cache_dtype: What keys and values are stored as; None for what the network computes them in.
        output: The run's folder; videos are written to `validation/step-N/`.

    Raises:
        ValueError: If the videos could not be made.
    """

    def __init__(
        self,
        arguments: RunArguments,
        pipe: CachedPromptsPipeline,
        transformer: LongLiveTransformer3DModel,
        *,
        size: tuple[int, int],
        num_latent_frames: int,
        fps: float,
        output: Path,
        kv_cache_dtype: torch.dtype | str | None = None,
    ):
        self.kv_cache_dtype = kv_cache_dtype
        self.arguments, self.pipe, self.size, self.fps, self.output = arguments, pipe, size, fps, output
        self.num_frames = arguments.validation_num_frames or pixel_frames(num_latent_frames)
        self._check(transformer)

    def is_due(self, step: int) -> bool:
        """Whether to make videos after update `step` (and not only after the last one)."""
        return bool(self.arguments.validation_prompts) and step % self.arguments.validation_steps == 0

    @torch.no_grad()
    def run(self, accelerator: Accelerator, step: int, network: Network) -> None:
        """Make one video for each prompt, with what `network` yields. Every process has to call this: all of them
        gather sharded weights. Videos that cannot be made are no reason to end the run: a warning says so."""
        if accelerator.is_main_process or accelerator.is_fsdp2:
            try:
                self._make_videos(accelerator, step, network)
            except FAILURES as error:
                logger.warning("the validation after update %d failed, training goes on: %s", step, error)
        accelerator.wait_for_everyone()

    def _check(self, transformer: LongLiveTransformer3DModel) -> None:
        """Raise a ValueError if a video could not be made: begin each of them, without taking a step."""
        pipe = self.pipe
        pipe.texts, pipe.transformer = EmptyTexts(transformer.config.text_dim), transformer
        try:
            for prompt in self.arguments.validation_prompts:
                pipe.stream(**self._options(0, prompt)).close()
        except ValueError as error:
            raise ValueError(f"Validation would fail: {error}") from error
        finally:
            pipe.transformer = None

    def _options(self, index: int, prompt: str) -> dict[str, Any]:
        """Return the arguments of the pipeline for the video of a prompt."""
        shots, (height, width) = split_shots(prompt), self.size
        return {
            **({"prompt": shots[0]} if len(shots) == 1 else {"shot_prompts": shots}),
            "height": height,
            "width": width,
            "num_frames": self.num_frames,
            "num_inference_steps": self.arguments.validation_num_inference_steps,
            "guidance_scale": self.arguments.validation_guidance_scale,
            "generator": torch.Generator().manual_seed(index),
            "max_sequence_length": self.pipe.texts.max_sequence_length,
        }

    def _make_videos(self, accelerator: Accelerator, step: int, network: Network) -> None:
        random_state = torch.get_rng_state()  # what is drawn here must not change the run
        failure: Exception | None = None
        with network() as transformer:
            self.pipe.transformer = transformer
            try:
                for index, prompt in enumerate(self.arguments.validation_prompts):
                    latents = self._make_latents(accelerator, index, prompt)
                    if accelerator.is_main_process and failure is None:
                        try:
                            self._write_video(accelerator, latents, index, prompt, step)
                        except FAILURES as error:  # the others wait for this process in the next video's network
                            failure = error
            finally:
                self.pipe.transformer = None
                torch.set_rng_state(random_state)
        if failure is not None:
            raise failure

    def _make_latents(self, accelerator: Accelerator, index: int, prompt: str) -> torch.Tensor:
        """Make a video's latents, `[1, C, F, h, w]`. Where weights are sharded, all processes run the network."""
        is_mixed = accelerator.mixed_precision == "bf16"
        with accelerator.autocast():
            return self.pipe(
                **self._options(index, prompt),
                # The keys and values that the network computes, which has float32 weights, are in bfloat16.
                kv_cache_dtype=self.kv_cache_dtype or (torch.bfloat16 if is_mixed else None),
                output_type="latent",
            ).frames

    def _write_video(
        self, accelerator: Accelerator, latents: torch.Tensor, index: int, prompt: str, step: int
    ) -> None:
        """Decode a video, and write it. Nothing here waits for another process."""
        vae, vae_device = self.pipe.vae, self.pipe.vae.device
        try:
            vae.to(accelerator.device)
            with accelerator.autocast():
                frames = self.pipe.decode_latents(latents)[0]
        finally:
            vae.to(vae_device)
        folder = self.output / "validation" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        with VideoWriter(folder / f"{index}.mp4", fps=self.fps) as writer:
            writer.write(frames)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                # First, middle and last frame: a video would need moviepy.
                moments = frames[[0, len(frames) // 2, -1]]
                tracker.writer.add_images(f"validation {index}: {prompt}", moments, step, dataformats="NHWC")
