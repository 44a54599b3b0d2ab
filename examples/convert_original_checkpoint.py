"""Make a pipeline from an original checkpoint: python examples/convert_original_checkpoint.py CHECKPOINT --output DIR

CHECKPOINT is a transformer in the format that LongLive-2.0 is published in (`.pt`). Tokenizer, text encoder and VAE
come from --base, a Wan or LongLive pipeline; for the published 5B checkpoints that is Wan2.2's, which is the default.
The folder then opens like any other pipeline, and can be shared with `push_to_hub`.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from longlive_diffusers import convert_checkpoint


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("checkpoint")
parser.add_argument("--base", default="Wan-AI/Wan2.2-TI2V-5B-Diffusers")
parser.add_argument("--output", required=True)
args = parser.parse_args()

folder = convert_checkpoint(args.checkpoint, args.base, args.output, dtype=torch.bfloat16, report=print)

pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
config = pipe.transformer.config
print(f"{folder}: {type(pipe).__name__}, {config.num_layers} layers, chunks of {config.chunk_size} latent frames")
