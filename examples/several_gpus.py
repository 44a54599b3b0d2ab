"""One video on several GPUs, in one stream: torchrun --nproc-per-node 2 examples/several_gpus.py [--model DIR_OR_REPO]

Every process runs this program and makes a part of every chunk: its frames, heads, columns of the picture. The
first one decides what is made, and writes the file. Without a GPU, this shows that it works, and saves no time.

Without --model, the small one that comes with the package is used: it has six heads, for two, three or six processes.
"""

import argparse

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline

from longlive_diffusers import VideoWriter
from longlive_diffusers.assets import toy_lora_path, toy_pipeline_path


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a pipeline whose weights are distilled to 4 steps")
parser.add_argument("--output", default="video.mp4")
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpu else "gloo")
device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dtype = torch.bfloat16 if on_gpu else torch.float32
pipe = DiffusionPipeline.from_pretrained(args.model or toy_pipeline_path(), dtype=dtype).to(device)
if args.model is None:
    pipe.load_lora_weights(toy_lora_path(4))
pipe.set_progress_bar_config(disable=dist.get_rank() > 0)
pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))

writer = VideoWriter(args.output) if dist.get_rank() == 0 else None
prompt = "A large red circle moves right on a teal background"
generator = torch.Generator().manual_seed(0)
with pipe.stream(prompt, generator=generator, output_type="uint8", async_decode=True) as session:
    for chunk in session:
        if writer is None:
            continue  # it only helps; the stream ends when the first process ends it
        writer.write(chunk.frames[0])
        if chunk.index == 3:
            session.prompt = "A large red circle moves left on a teal background"
        if chunk.index == 7:
            break
if writer is not None:
    writer.close()
dist.destroy_process_group()
