"""Use a LoRA: python examples/load_lora.py LORA [--model DIR_OR_REPO] [--output video.mp4]

LORA is a diffusers or PEFT file, a folder or a repository with one, or the reference's own `lora.pt`. It must fit the
model.

Without --model, the small one that comes with the package is used: it knows plain shapes that move.
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import encode_video

import longlive_diffusers  # noqa: F401 - registers its classes with diffusers
from longlive_diffusers.assets import toy_pipeline_path


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("lora")
parser.add_argument("--model", default=toy_pipeline_path())
parser.add_argument("--output", default="video.mp4")
parser.add_argument("--steps", type=int, default=30, help="4 for distilled models")
parser.add_argument("--guidance", type=float, default=2.0, help="1 for distilled models")
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
pipe.to("cuda" if on_gpu else "cpu")

pipe.load_lora_weights(args.lora, adapter_name="style")
pipe.set_adapters("style", 0.8)  # how much of it; several adapters can be mixed
pipe.fuse_lora(components=["transformer"])  # optional: the LoRA then costs no time; it can be unfused

video = pipe(
    "A red circle moves right",
    num_frames=29,
    num_inference_steps=args.steps,
    guidance_scale=args.guidance,
    generator=torch.Generator().manual_seed(0),
)
encode_video(video.frames[0], fps=24, output_path=args.output)
