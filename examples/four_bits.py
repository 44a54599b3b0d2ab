"""Weights and KV cache in 4 bits: python examples/four_bits.py [--model DIR_OR_REPO] [--output video.mp4]

The transformer's weights are quantized while they are loaded; how they are multiplied depends on the device, and
`print(pipe.transformer)` shows it for every layer. `longlive quantize` writes such a pipeline to disk.

Without --model, the small one that comes with the package is used: it knows plain shapes that move.
"""

import argparse

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.utils import encode_video

from longlive_diffusers import NVFP4Config
from longlive_diffusers.assets import toy_pipeline_path


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=toy_pipeline_path())
parser.add_argument("--output", default="video.mp4")
parser.add_argument("--steps", type=int, default=30, help="4 for distilled models")
parser.add_argument("--guidance", type=float, default=2.0, help="1 for distilled models")
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(
    args.model,
    dtype=torch.bfloat16 if on_gpu else torch.float32,
    quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": NVFP4Config()}),
)
pipe.to("cuda" if on_gpu else "cpu")
print(pipe.transformer.blocks[0].attn1.to_q)

video = pipe(
    "A large red circle moves right on a black background",
    num_frames=45,
    num_inference_steps=args.steps,
    guidance_scale=args.guidance,
    kv_cache_dtype="nvfp4",
    generator=torch.Generator().manual_seed(0),
)
encode_video(video.frames[0], fps=24, output_path=args.output)
