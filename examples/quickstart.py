"""A first video: python examples/quickstart.py [--model DIR_OR_REPO] [--output video.mp4]

Without --model, the tiny untrained pipeline of the package is used: it shows that everything works, in seconds on a
CPU, but what it draws is a moving texture.
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import encode_video

import longlive_diffusers  # noqa: F401 - registers its classes with diffusers
from longlive_diffusers.assets import toy_pipeline_path


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=toy_pipeline_path())
parser.add_argument("--output", default="video.mp4")
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
pipe.to("cuda" if on_gpu else "cpu")

video = pipe("A red circle moves right over a blue sky", num_frames=45, generator=torch.Generator().manual_seed(0))
encode_video(video.frames[0], fps=24, output_path=args.output)
