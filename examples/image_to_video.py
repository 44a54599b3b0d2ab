"""Bring an image to life: python examples/image_to_video.py [--image FILE] [--model DIR_OR_REPO] [--output video.mp4]

The image becomes the first frame, and is resized to the video's size. Without --image, one is drawn. To continue a
video instead, pass its frames as `video=`.

Without --model, the tiny untrained pipeline of the package is used; what it draws is a moving texture.
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import encode_video, load_image
from PIL import Image, ImageDraw

import longlive_diffusers  # noqa: F401 - registers its classes with diffusers
from longlive_diffusers.assets import toy_pipeline_path


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--image")
parser.add_argument("--model", default=toy_pipeline_path())
parser.add_argument("--output", default="video.mp4")
args = parser.parse_args()

if args.image is None:
    image = Image.new("RGB", (512, 512), "skyblue")
    ImageDraw.Draw(image).ellipse((160, 160, 352, 352), fill="red")
else:
    image = load_image(args.image)

on_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
pipe.to("cuda" if on_gpu else "cpu")

video = pipe(
    "A red ball bounces against a blue sky",
    image=image,
    num_frames=45,
    generator=torch.Generator().manual_seed(0),
)
encode_video(video.frames[0], fps=24, output_path=args.output)
