"""A live stream, directed while it runs: python examples/streaming_prompt_switch.py [--model ...] [--output video.mp4]

The stream is endless, and its memory does not grow. A new prompt takes effect with the next chunk that is begun; a
cut also begins a new shot. The file can be watched while it is written.

Without --model, the small one that comes with the package is used: it knows plain shapes that move.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from longlive_diffusers import VideoWriter
from longlive_diffusers.assets import toy_pipeline_path


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=toy_pipeline_path())
parser.add_argument("--output", default="video.mp4")
parser.add_argument("--steps", type=int, default=30, help="4 for distilled models")
parser.add_argument("--guidance", type=float, default=2.0, help="1 for distilled models")
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
pipe.to("cuda" if on_gpu else "cpu")
pipe.set_progress_bar_config(disable=True)

with (
    # Decode each chunk while the next is denoised.
    pipe.stream(
        "A large blue circle moves left, grey background",
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="uint8",  # what a file needs
        async_decode=True,
    ) as session,
    VideoWriter(args.output, fps=24) as writer,
):
    for chunk in session:
        writer.write(chunk.frames[0])
        print(f"chunk {chunk.index}, shot {chunk.shot_index}: {chunk.prompt}")
        if chunk.index == 2:
            session.prompt = "A large green circle moves down, grey background"
        elif chunk.index == 5:
            session.cut("A small white square stays still on a black background")
        elif chunk.index == 9:
            break
