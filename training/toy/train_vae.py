"""Train the small VAE of the embedded pipeline on the toy world: python training/toy/train_vae.py --output DIR

It has the structure of Wan2.2's VAE (2x2 patches of pixels, causal, 4 times smaller in time) and a thousandth of its
size; its latents are 8 times smaller in space.

What takes long is learning to draw sharp edges, which needs many small steps. So the VAE first learns from single
pictures, which cost a fifth of the shortest clip. Of a causal kernel, only the last slice sees a single picture; the
other slices begin as zeros, so on clips the network begins by repeating pictures. Then come longer and longer clips: a
causal VAE decodes frame 60 from features of the frames before it, which never build up in a clip of a few frames;
trained on short clips alone, it looks good on those and fails on long ones.

The loss is the squared error, with a higher weight on objects (most of a picture is background), plus a little of the
KL divergence, with latents drawn from the posterior. A killed run resumes from its last checkpoint; the result appears
only when it is complete. `--start DIR` trains a finished VAE further, on clips from the first step.
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, unpatchify
from torch.nn import functional as F
from tqdm import tqdm

from longlive_diffusers import pixel_frames
from longlive_diffusers.atomic_write import new_file, new_folder
from longlive_diffusers.cli.device import choose_device
from longlive_diffusers.conversion.output_folder import prepare_output
from longlive_diffusers.frame_counts import TEMPORAL_SCALE
from longlive_diffusers.models.streaming_vae import StreamingDecoder, StreamingEncoder
from longlive_diffusers.user_path import user_path
from one_line import run
from schedules import one_cycle
from world import draw_sample, render


LATENT_CHANNELS = 16
OBJECT_WEIGHT = 4.0
# For each stage, the fraction of training at which it ends, the frames of a clip, and the clips of a step.
STAGES = ((0.48, 1, 8), (0.88, 5, 2), (0.97, 29, 1), (1.0, 61, 1))


@dataclass(frozen=True)
class Settings:
    steps: int
    learning_rate: float
    kl_weight: float
    width: int
    seed: int
    start: str | None = None


def build_vae(width: int) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=width,
        decoder_base_dim=width,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    # The posterior begins narrow: at its usual width of 1, noise would drown what the first steps could learn from.
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    inflate(vae)
    return vae


@torch.no_grad()
def inflate(vae: AutoencoderKLWan) -> None:
    """Initialize the VAE so that it repeats single pictures: kernels see only the newest frame, and the layers that
    halve or double the frames pass it on."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1:
            module.weight[:, :, :-1] = 0
        if isinstance(module, WanResample) and module.mode in ("upsample3d", "downsample3d"):
            weight = module.time_conv.weight.zero_()
            module.time_conv.bias.zero_()
            channels = weight.shape[1]
            for copy in weight.split(channels):
                copy[range(channels), range(channels), -1, 0, 0] = 1


@contextmanager
def for_pictures(vae: AutoencoderKLWan) -> Iterator[None]:
    """In this context the VAE takes single frames, and convolves them in two dimensions with the last slices of its
    kernels: the result is the same, at a third of the cost."""
    convolutions = [module for module in vae.modules() if isinstance(module, WanCausalConv3d)]
    for module in convolutions:
        module.forward = MethodType(convolve_picture, module)
    try:
        yield
    finally:
        for module in convolutions:
            del module.forward


def convolve_picture(self: WanCausalConv3d, x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
    left, _, top, _, _, _ = self._padding
    picture = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, stride=self.stride[1:], padding=(top, left))
    return picture.unsqueeze(2)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decode like `vae.decode`, but without clamping to [-1, 1], beyond which there would be no gradient."""
    cache = [None] * vae._cached_conv_counts["decoder"]
    frames = [
        vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        for index, frame in enumerate(vae.post_quant_conv(latents).split(1, dim=2))
    ]
    return unpatchify(torch.cat(frames, dim=2), patch_size=vae.config.patch_size)


def draw_clips(seed: str, batch: int, frames: int) -> torch.Tensor:
    """Draw clips of the toy world, `[batch, 3, frames, 64, 64]`, from random moments, some with cuts and prompt
    switches."""
    rng = random.Random(seed)
    clips = []
    for _ in range(batch):
        parts = draw_sample(rng, 8, 2)
        lengths = [pixel_frames(part.num_chunks * 2, opens_video=index == 0) for index, part in enumerate(parts)]
        # The clip begins a whole number of latent frames into the video, so that a cut falls between two latent
        # frames, as it does in the dataset.
        start = TEMPORAL_SCALE * rng.randint(0, (sum(lengths) - frames) // TEMPORAL_SCALE)
        pictures = []
        for part, length in zip(parts, lengths, strict=True):
            first, last = max(start, 0), min(start + frames, length)
            if first < last:
                pictures.append(torch.from_numpy(render(part.scene.after(first), last - first)))
            start -= length
        clips.append(torch.cat(pictures))
        assert len(clips[-1]) == frames
    return torch.stack(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def stage_at(progress: float, further: bool = False) -> tuple[int, int]:
    """Return the frames of a clip and the clips of a step at `progress`, the fraction of training in [0, 1) that is
    done. A VAE that is trained further skips the stage of single pictures."""
    if further:
        progress = STAGES[0][0] + progress * (1 - STAGES[0][0])
    return next((frames, clips) for end, frames, clips in STAGES if progress < end)


def train_step(vae: AutoencoderKLWan, clips: torch.Tensor, generator: torch.Generator, kl_weight: float):
    """Return the loss and the mean squared error (of pixels in [-1, 1])."""
    posterior = vae.encode(clips).latent_dist
    errors = (decode(vae, posterior.sample(generator)) - clips).square()
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return (errors * object_weights(clips)).mean() + kl_weight * divergence, errors.mean()


def object_weights(clips: torch.Tensor) -> torch.Tensor:
    """Return the weight of each pixel of clips `[B, 3, frames, H, W]`: more where there is an object."""
    background = clips.flatten(2).median(dim=2).values[:, :, None, None, None]
    is_object = ((clips - background).abs().amax(dim=1, keepdim=True) > 0.1).float()
    return 1 + OBJECT_WEIGHT * is_object


@torch.no_grad()
def measure_statistics(vae: AutoencoderKLWan, seed: int) -> None:
    """Set `latents_mean` and `latents_std`. A channel that is hardly used is not scaled up to the others."""
    latents = torch.cat([vae.encode(draw_clips(f"{seed} statistics {i}", 8, 61)).latent_dist.mean for i in range(8)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    std = std.clamp(min=0.25 * std.max().item())
    rounded = {name: [round(x, 4) for x in x.tolist()] for name, x in (("latents_mean", mean), ("latents_std", std))}
    vae.register_to_config(**rounded)


@torch.no_grad()
def streamed_psnr(vae: AutoencoderKLWan, seed: str, clips: int, frames: int) -> float:
    """Return the PSNR in dB of whole clips that are encoded and decoded chunk by chunk, as in pipelines."""
    pixels = draw_clips(seed, clips, frames)
    encoder, decoder = StreamingEncoder(vae), StreamingDecoder(vae)
    chunks = [pixels[:, :, :5], *pixels[:, :, 5:].split(8, dim=2)]
    decoded = torch.cat([decoder.decode(encoder.encode(chunk)) for chunk in chunks], dim=2)
    return -10 * torch.log10(((decoded - pixels) / 2).square().mean()).item()


def train(vae: AutoencoderKLWan, settings: Settings, device: str, checkpoint: Path) -> None:
    """
    Train the VAE, from the checkpoint if there is one.

    Raises:
        ValueError: If the checkpoint is that of a run with other settings.
    """
    steps, learning_rate = settings.steps, settings.learning_rate
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = one_cycle(optimizer, learning_rate, steps=steps, warmup=0.02)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule}
    first_step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["settings"] != asdict(settings):
            raise ValueError(f"'{checkpoint}' is of a run with {state['settings']}, this one has {asdict(settings)}.")
        first_step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])

    bar = tqdm(range(first_step, steps), initial=first_step, total=steps, desc="VAE", unit="step", mininterval=1)
    for step in bar:
        frames, count = stage_at(step / steps, further=settings.start is not None)
        clips = draw_clips(f"{settings.seed} {step}", count, frames).to(device)
        generator = torch.Generator(device).manual_seed(settings.seed * 1_000_003 + step)
        with for_pictures(vae) if frames == 1 else nullcontext():
            loss, error = train_step(vae, clips, generator, settings.kl_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(frames=frames, dB=f"{-10 * torch.log10(error.detach() / 4).item():.1f}", refresh=False)
        if (step + 1) % 200 == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            with new_file(checkpoint) as file:
                torch.save({**state, "step": step + 1, "settings": asdict(settings)}, file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the VAE of the embedded pipeline on the toy world.")
    parser.add_argument(
        "--output",
        type=user_path,
        required=True,
        help="The folder to write the VAE to, in diffusers' format; new or empty.",
    )
    parser.add_argument("--start", help="A folder of a VAE to train further.")
    parser.add_argument(
        "--steps", type=int, default=7000, help="The number of updates of the weights (default: %(default)s)."
    )
    parser.add_argument(
        "--learning_rate", type=float, default=3e-3, help="The largest learning rate (default: %(default)s)."
    )
    parser.add_argument(
        "--kl_weight", type=float, default=2e-5, help="The weight of the KL term (default: %(default)s)."
    )
    parser.add_argument("--width", type=int, help="The number of channels of the first level (default: 16).")
    parser.add_argument("--seed", type=int, default=0, help="The seed of weights, clips and noise (default: 0).")
    parser.add_argument(
        "--device",
        help="Where to train (default: a GPU if there is one, else the CPU).",
    )
    arguments = vars(parser.parse_args())
    output, device = arguments.pop("output"), arguments.pop("device")
    if arguments["start"] is not None:
        if arguments["width"] is not None:
            parser.error(f"--width {arguments['width']} is of a new VAE: one to --start from has its own")
        if not (Path(arguments["start"]) / "config.json").is_file():
            parser.error(f"--start: there is no VAE in '{arguments['start']}'")
    if arguments["width"] is None:
        arguments["width"] = 16
    settings = Settings(**arguments)
    if min(settings.steps, settings.width) < 1:
        parser.error(f"--steps and --width must be at least 1, got {settings.steps} and {settings.width}")
    for name in ("learning_rate", "kl_weight"):
        if not 0 <= getattr(settings, name) < math.inf:
            parser.error(f"--{name} must be a number of at least 0, got {getattr(settings, name)}")
    device = choose_device(device)
    prepare_output(output)
    output = output.resolve()  # "." has no name that the checkpoint could have beside it

    torch.manual_seed(settings.seed)
    if settings.start is None:
        vae = build_vae(settings.width)
    else:
        vae = AutoencoderKLWan.from_pretrained(settings.start, torch_dtype=torch.float32)
    vae.to(device)
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = output.with_name(f"{output.name}.checkpoint.pt")
    train(vae, settings, device, checkpoint)

    vae.requires_grad_(False).eval().to("cpu")
    measure_statistics(vae, settings.seed)
    for frames in (13, 29, 61):
        print(f"streamed clips of {frames} frames: {streamed_psnr(vae, f'test {frames}', 16, frames):.2f} dB")
    with new_folder(output) as folder:
        vae.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    print(f"{output}: {sum(parameter.numel() for parameter in vae.parameters()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    sys.exit(run(main))
