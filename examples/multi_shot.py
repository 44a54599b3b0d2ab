"""Three shots, one video: python examples/multi_shot.py [--model DIR_OR_REPO] [--output video.mp4]

Every shot has a prompt, and a length in chunks. The frames that open a shot are remembered for as long as it lasts,
and the first frames of the video for as long as the video does, so that people and places stay the same.

Without --model, the small one that comes with the package is used: it knows plain shapes that move.
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import encode_video

from longlive_diffusers import pixel_frames
from longlive_diffusers.assets import toy_pipeline_path


SHOTS = {  # prompt: chunks
    "A large red circle moves right on a teal background": 3,
    "A small white square moves up over brown": 2,
    "A large yellow triangle stays still on a black background": 3,
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=toy_pipeline_path())
parser.add_argument("--output", default="video.mp4")
parser.add_argument("--steps", type=int, default=30, help="4 for distilled models")
parser.add_argument("--guidance", type=float, default=2.0, help="1 for distilled models")
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
pipe.to("cuda" if on_gpu else "cpu")

num_latent_frames = sum(SHOTS.values()) * pipe.transformer.config.chunk_size
video = pipe(
    shot_prompts=list(SHOTS),
    chunks_per_shot=list(SHOTS.values()),
    num_inference_steps=args.steps,
    guidance_scale=args.guidance,
    num_frames=pixel_frames(num_latent_frames),
    generator=torch.Generator().manual_seed(0),
)
encode_video(video.frames[0], fps=24, output_path=args.output)
