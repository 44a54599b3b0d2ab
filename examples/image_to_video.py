"""Bring an image to life: python examples/image_to_video.py [--image FILE] [--model DIR_OR_REPO] [--output video.mp4]

The image becomes the first frame, cropped to the video's shape. Without --image, one is drawn. To continue a
video instead, pass its frames as `video=`.

Without --model, the small one that comes with the package is used: it knows plain shapes that move.
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
parser.add_argument("--steps", type=int, default=30, help="4 for distilled models")
parser.add_argument("--guidance", type=float, default=2.0, help="1 for distilled models")
args = parser.parse_args()

if args.image is None:
    image = Image.new("RGB", (512, 512), (125, 125, 125))
    # Of a size, and at one of the places, with which the small model's videos begin.
    ImageDraw.Draw(image).ellipse((120, 248, 264, 392), fill=(225, 40, 40))
else:
    image = load_image(args.image)

on_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
pipe.to("cuda" if on_gpu else "cpu")

video = pipe(
    "A large red circle moves right on a grey background",
    image=image,
    num_inference_steps=args.steps,
    guidance_scale=args.guidance,
    num_frames=45,
    generator=torch.Generator().manual_seed(0),
)
encode_video(video.frames[0], fps=24, output_path=args.output)
