"""What ranks stream together, compared with one process; run by torchrun, writes what it found as JSON.

    torchrun --nproc-per-node 4 tests/programs/shared_streams.py RESULTS.json

Streams are shared by all four ranks, and by two pairs of them. Every rank makes the video by itself as well, so that
there is nothing to hand over: what is written are the largest differences over the ranks, and whether all were
bit-equal. Ranks draw from different global seeds, and other ranks than the first ask for other prompts and noise.
"""

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from peft import LoraConfig

from longlive_diffusers import LongLivePipeline, NVFP4Config, StreamParallelConfig
from longlive_diffusers.nvfp4.quantizer import quantize_model
from tests.pipelines.test_golden_rollouts import arguments_of, pipeline_for
from tests.support.golden_models import golden_rollouts
from tests.support.tiny_pipeline import TEXT_LENGTH, tiny_pipeline, tiny_transformer


CHUNK_SIZE = 4
SHAPE = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 64, "chunk_size": CHUNK_SIZE}

Run = Callable[[LongLivePipeline], torch.Tensor]
Case = tuple[Callable[[], LongLivePipeline], Run]


def pipeline(**overrides) -> LongLivePipeline:
    """Chunks of four frames, so that two and four ranks can have whole frames of them."""
    pipe = tiny_pipeline(transformer=tiny_transformer(**SHAPE, **overrides))
    pipe.register_to_config(window_size=12, sink_size=4)
    return pipe


def place(pipe: LongLivePipeline) -> int:
    """The place of this rank among those that share the stream; 0 for a process by itself."""
    return 0 if pipe.stream_ranks is None else pipe.stream_ranks.rank


def noise(pipe: LongLivePipeline, num_chunks: int, batch: int = 1) -> torch.Tensor:
    """The first rank's noise; that of the others must not matter."""
    generator = torch.Generator().manual_seed(place(pipe))
    return torch.randn(batch, 8, num_chunks * CHUNK_SIZE, 4, 4, generator=generator)


ARGUMENTS = {"num_inference_steps": 2, "max_sequence_length": TEXT_LENGTH, "output_type": "latent"}


def call(pipe: LongLivePipeline, **arguments) -> torch.Tensor:
    return torch.as_tensor(pipe(**{**ARGUMENTS, **arguments}).frames)


def golden_cases() -> Iterator[tuple[str, Case]]:
    for name in golden_rollouts():
        yield f"golden {name}", (functools.partial(pipeline_for, name), lambda pipe, n=name: call(pipe, **arguments_of(n)))


def said(pipe: LongLivePipeline, prompt: str) -> str:
    """The first rank's prompt; that of the others must not matter."""
    return prompt if place(pipe) == 0 else f"{prompt}, as rank {place(pipe)} sees it"


def long_video(pipe: LongLivePipeline, **arguments) -> torch.Tensor:
    """Seven chunks of two videos with cuts at different chunks, through a window that evicts."""
    shots = [["a cat", "a dog", "a bird"], ["a tree in the wind", "a house"]]
    shots = [[said(pipe, prompt) for prompt in video] for video in shots]
    durations = [[2, 2, 3], [3, 4]]
    return call(pipe, shot_prompts=shots, chunks_per_shot=durations, latents=noise(pipe, 7, 2), **arguments)


def switches(pipe: LongLivePipeline, **arguments) -> torch.Tensor:
    """A stream in which only the first rank switches prompts, cuts, takes more steps, and ends the video."""
    leads, chunks = place(pipe) == 0, []
    prompt, generator = said(pipe, "a cat"), torch.Generator().manual_seed(place(pipe))
    with pipe.stream(prompt, generator=generator, **{**ARGUMENTS, **arguments}) as session:
        for chunk in session:
            chunks.append(torch.as_tensor(chunk.latents))
            if leads and chunk.index == 2:
                session.prompt = "a dog"
            if leads and chunk.index == 4:
                session.cut("a bird")
                session.num_inference_steps = 3
            if not leads and chunk.index == 3:
                session.prompt = "what nobody asked for"
            if leads and chunk.index == 6:
                session.interrupt()
    assert len(chunks) == 7, len(chunks)
    return torch.cat(chunks, dim=2)


CACHES = (None, "fp8", "nvfp4")


def matrix() -> Iterator[tuple[str, Case]]:
    for cache in CACHES:
        for relative in (False, True):
            options = {"kv_cache_dtype": cache, "relative_rope": relative}
            name = f"{cache or 'plain'} cache, {'relative' if relative else 'absolute'} RoPE"
            yield f"{name}: two videos, cuts", (pipeline, lambda pipe, o=options: long_video(pipe, **o))
            yield f"{name}: switches", (pipeline, lambda pipe, o=options: switches(pipe, **o))
            yield f"{name}: guidance", (pipeline, lambda pipe, o=options: long_video(pipe, guidance_scale=3.0, **o))


def with_lora() -> LongLivePipeline:
    pipe = pipeline()
    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False))
    return pipe


def in_four_bits(backend: str) -> LongLivePipeline:
    pipe = pipeline()
    quantize_model(pipe.transformer, NVFP4Config(backend=backend))
    return pipe


def wide_sinks() -> LongLivePipeline:
    """Sinks and a window that are not whole chunks: rewriting history then meets groups of 1 and 3 frames."""
    pipe = pipeline()
    pipe.register_to_config(window_size=14, sink_size=3, multi_shot_sink=False)
    return pipe


def changes(pipe: LongLivePipeline) -> torch.Tensor:
    """A callback that, on the first rank, changes latents, prompts, guidance and scale, and interrupts."""

    def change(pipe, step, timestep, tensors):
        if place(pipe) > 0:
            pipe._guidance_scale = 7.0
            return {"latents": tensors["latents"] + 1}
        if step == 2:
            return {"latents": tensors["latents"] * 0.5, "prompt_embeds": tensors["prompt_embeds"].flip(1)}
        if step == 3:
            pipe._guidance_scale = 2.0
        if step == 5:
            pipe._interrupt = True
        return {}

    names = ["latents", "prompt_embeds"]
    return call(
        pipe,
        prompt="a cat",
        latents=noise(pipe, 5),
        guidance_scale=3.0,
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=names,
    )


def from_image(pipe: LongLivePipeline) -> torch.Tensor:
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(place(pipe)))
    return call(pipe, prompt="a cat", image=image, latents=noise(pipe, 2))


def from_video(pipe: LongLivePipeline) -> torch.Tensor:
    video = torch.rand(13, 3, 64, 64, generator=torch.Generator().manual_seed(place(pipe)))
    return call(pipe, prompt="a cat", video=video, latents=noise(pipe, 2))


def asynchronously(pipe: LongLivePipeline) -> torch.Tensor:
    """Decoded in one thread while the next chunk is made in another; the first rank closes an endless stream."""
    generator, chunks = torch.Generator().manual_seed(place(pipe)), []
    arguments = {**ARGUMENTS, "output_type": "pt", "generator": generator, "async_decode": True}
    with pipe.stream(said(pipe, "a cat"), **arguments) as session:
        for chunk in session:
            chunks.append(chunk.frames[0])
            if place(pipe) == 0 and chunk.index == 3:
                break
    return torch.cat(chunks)


def from_global_seed(pipe: LongLivePipeline) -> torch.Tensor:
    torch.manual_seed(place(pipe))
    return call(pipe, prompt="a cat", num_frames=29)


FEATURES: dict[str, Case] = {
    "LoRA": (with_lora, long_video),
    "NVFP4 weights": (lambda: in_four_bits("w4a16"), long_video),
    "NVFP4 weights and activations": (lambda: in_four_bits("emulate"), long_video),
    "sinks that are no chunks": (wide_sinks, switches),
    "callback": (pipeline, changes),
    "image": (pipeline, from_image),
    "video": (pipeline, from_video),
    "asynchronous": (pipeline, asynchronously),
    "global seed": (pipeline, from_global_seed),
}

def compiled() -> LongLivePipeline:
    pipe = pipeline()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return pipe


def compiled_in_four_bits() -> LongLivePipeline:
    pipe = in_four_bits("emulate")
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return pipe


COMPILED = {
    "compiled": (compiled, lambda pipe: switches(pipe, kv_cache_dtype="nvfp4")),
    "compiled in four bits": (compiled_in_four_bits, long_video),
}
BRANCHES = {
    "branches: two videos, cuts": (pipeline, lambda pipe: long_video(pipe, guidance_scale=3.0)),
    "branches: switches": (wide_sinks, lambda pipe: switches(pipe, guidance_scale=3.0, kv_cache_dtype="fp8")),
    "branches: callback": (pipeline, changes),
}

CASES: dict[str, Case] = {**COMPILED, **BRANCHES, **FEATURES, **dict(golden_cases()), **dict(matrix())}


def compare(case: Case, config: ContextParallelConfig) -> dict[str, float]:
    make, run = case
    torch.manual_seed(0)
    expected = run(make())
    torch.manual_seed(dist.get_rank())
    pipe = make()
    pipe.transformer.enable_parallelism(config=config)
    found = run(pipe)
    assert found.shape == expected.shape
    return {"difference": (found - expected).abs().max().item(), "largest": expected.abs().max().item()}


ONLY = sys.argv[2] if len(sys.argv) > 2 else ""
DEGREES = [int(sys.argv[3])] if len(sys.argv) > 3 else (2, 4)


def main(path: Path) -> None:
    import faulthandler; faulthandler.dump_traceback_later(200, exit=True)
    dist.init_process_group("gloo")
    results = {}
    for degree in DEGREES:
        for name, case in CASES.items():
            if not re.search(ONLY, name):
                continue
            began = time.perf_counter()
            config = ContextParallelConfig(ulysses_degree=degree)
            if name in BRANCHES:
                config = StreamParallelConfig(ulysses_degree=degree // 2, cfg_parallel=True)
            found = compare(case, config)
            if dist.get_rank() == 0:
                print(degree, name, found, f"{time.perf_counter() - began:.2f} s", flush=True)
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, found)
            results[f"{degree} ranks: {name}"] = {key: max(one[key] for one in everywhere) for key in found}
    if dist.get_rank() == 0:
        path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
