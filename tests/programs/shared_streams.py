"""What ranks stream together, compared with one process; run by torchrun, writes what it found as JSON.

    torchrun --nproc-per-node 2 tests/programs/shared_streams.py RESULTS.json [PATTERN]

All ranks share each stream, and the first makes it by itself as well; what is written is the largest difference over
the ranks. Ranks draw from different global seeds, and all but the first ask for other prompts, pictures and noise,
which must not matter. With four ranks, there are fewer cases, and one in which two pairs of them make a video each.
"""

import functools
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from peft import LoraConfig

from longlive_diffusers import LongLivePipeline, NVFP4Config, StreamParallelConfig
from longlive_diffusers.nvfp4.quantizer import quantize_model
from longlive_diffusers.parallel.head_exchange import EXCHANGE_DTYPES
from tests.support.golden_models import pipeline_for, rollout_arguments
from tests.support.tiny_decoder import small_decoder
from tests.support.tiny_pipeline import TEXT_LENGTH, tiny_pipeline, tiny_transformer


CHUNK_SIZE = 4
SHAPE = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 64, "chunk_size": CHUNK_SIZE}
ARGUMENTS = {"num_inference_steps": 2, "max_sequence_length": TEXT_LENGTH, "output_type": "latent"}

Run = Callable[[LongLivePipeline], torch.Tensor]
Case = tuple[Callable[[], LongLivePipeline], Run]


# -- pipelines -------------------------------------------------------------------------------------------------------


def pipeline() -> LongLivePipeline:
    """Chunks of four frames, so that two and four ranks can have whole frames of them."""
    pipe = tiny_pipeline(transformer=tiny_transformer(**SHAPE))
    pipe.register_to_config(window_size=12, sink_size=4)
    return pipe


def with_lora() -> LongLivePipeline:
    pipe = pipeline()
    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False))
    return pipe


def in_four_bits(backend: str) -> LongLivePipeline:
    pipe = pipeline()
    quantize_model(pipe.transformer, NVFP4Config(backend=backend))
    return pipe


def odd_sinks() -> LongLivePipeline:
    """Sinks and a window that are no whole chunks: rewriting history then meets groups of 1 and 3 frames."""
    pipe = pipeline()
    pipe.register_to_config(window_size=14, sink_size=3, multi_shot_sink=False)
    return pipe


# -- videos ----------------------------------------------------------------------------------------------------------


def place(pipe: LongLivePipeline) -> int:
    """The place of this rank among those that share the stream; 0 for a process by itself."""
    return 0 if pipe.stream_ranks is None else pipe.stream_ranks.rank


def noise(pipe: LongLivePipeline, num_chunks: int, batch: int = 1) -> torch.Tensor:
    """The first rank's noise, or what the others have in its place."""
    generator = torch.Generator().manual_seed(place(pipe))
    return torch.randn(batch, 8, num_chunks * CHUNK_SIZE, 4, 4, generator=generator)


def said(pipe: LongLivePipeline, prompt: str) -> str:
    """The first rank's prompt, or what the others have in its place."""
    return prompt if place(pipe) == 0 else f"{prompt}, as rank {place(pipe)} sees it"


def call(pipe: LongLivePipeline, **arguments) -> torch.Tensor:
    return torch.as_tensor(pipe(**{**ARGUMENTS, **arguments}).frames)


def two_videos(pipe: LongLivePipeline, **arguments) -> torch.Tensor:
    """Two videos with cuts at different chunks, through a window that evicts."""
    shots = [["a cat", "a dog", "a bird"], ["a tree in the wind", "a house"]]
    shots = [[said(pipe, prompt) for prompt in video] for video in shots]
    return call(pipe, shot_prompts=shots, chunks_per_shot=[[2, 1, 2], [1, 4]], latents=noise(pipe, 5, 2), **arguments)


def switches(pipe: LongLivePipeline, **arguments) -> torch.Tensor:
    """A stream of which only the first rank switches prompts, cuts, takes more steps, and ends the video."""
    leads, chunks = place(pipe) == 0, []
    generator = torch.Generator().manual_seed(place(pipe))
    with pipe.stream(said(pipe, "a cat"), generator=generator, **{**ARGUMENTS, **arguments}) as session:
        for chunk in session:
            chunks.append(chunk.latents)
            if leads and chunk.index == 3:
                session.prompt = "a dog"
            if leads and chunk.index == 4:
                session.cut("a bird")
                session.num_inference_steps = 3
            if not leads and chunk.index == 2:
                session.prompt = "what nobody asked for"
            if leads and chunk.index == 5:
                session.interrupt()
    assert len(chunks) == 6, len(chunks)
    return torch.cat(chunks, dim=2)


def compiled(pipe: LongLivePipeline) -> torch.Tensor:
    """Two chunks by ranks that compile, which are those of one process that does not."""
    if pipe.stream_ranks is not None:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    return call(pipe, prompt="a cat", latents=noise(pipe, 2))


def blends(pipe: LongLivePipeline, **arguments) -> torch.Tensor:
    """A stream of which only the first rank blends, twice, and ends the video."""
    leads, chunks = place(pipe) == 0, []
    generator = torch.Generator().manual_seed(place(pipe))
    with pipe.stream(said(pipe, "a cat"), generator=generator, **{**ARGUMENTS, **arguments}) as session:
        for chunk in session:
            chunks.append(chunk.latents)
            if leads and chunk.index == 1:
                session.blend("a dog", 3)
            if leads and chunk.index == 3:
                session.blend("a bird", 2, interpolation="spherical")
            if not leads and chunk.index == 2:
                session.blend("what nobody asked for", 2)
            if leads and chunk.index == 6:
                session.interrupt()
    return torch.cat(chunks, dim=2)


def in_bytes(pipe: LongLivePipeline) -> torch.Tensor:
    """What bytes are away from floats that are rounded here: nothing, also where ranks decode together."""
    arguments = {**ARGUMENTS, "prompt": "a cat", "latents": noise(pipe, 2)}
    floats, found = (pipe(**{**arguments, "output_type": kind}).frames for kind in ("np", "uint8"))
    return torch.from_numpy(found.astype("float32") - (floats * 255).round())


def beside_a_forward(pipe: LongLivePipeline) -> torch.Tensor:
    """A video, and a forward without a cache that the first rank runs by itself."""
    found = two_videos(pipe)
    if place(pipe) == 0:
        with torch.no_grad():
            pipe.transformer(noise(pipe, 1), torch.zeros(1), torch.ones(1, TEXT_LENGTH, 16))
    return found


def with_callback(pipe: LongLivePipeline) -> torch.Tensor:
    """A callback that, on the first rank, changes latents, prompts and guidance, and interrupts."""

    def change(pipe, step, timestep, tensors):
        if place(pipe) > 0:
            pipe._guidance_scale = 7.0
            return {"latents": tensors["latents"] + 1}
        if step == 1:
            tensors["latents"].mul_(0.9)
        if step == 2:
            return {"latents": tensors["latents"] * 0.5, "prompt_embeds": tensors["prompt_embeds"].flip(1)}
        if step == 3:
            pipe._guidance_scale = 2.0
        if step == 5:
            pipe._interrupt = True
        return {}

    return call(
        pipe,
        prompt="a cat",
        latents=noise(pipe, 5),
        guidance_scale=3.0,
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )


def with_callback_that_looks(pipe: LongLivePipeline) -> torch.Tensor:
    """A callback that is shown the prompts, and changes nothing: all ranks compute their keys anew, or none."""
    looks = {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    return call(pipe, prompt="a cat", latents=noise(pipe, 2), **looks)


def from_image(pipe: LongLivePipeline) -> torch.Tensor:
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(place(pipe)))
    return call(pipe, prompt="a cat", image=image, latents=noise(pipe, 2))


def from_video(pipe: LongLivePipeline) -> torch.Tensor:
    video = torch.rand(13, 3, 64, 64, generator=torch.Generator().manual_seed(place(pipe)))
    return call(pipe, prompt="a cat", video=video, latents=noise(pipe, 2))


def asynchronously(pipe: LongLivePipeline) -> torch.Tensor:
    """Frames that are decoded in one thread while the next chunk is made in another; the first rank ends an endless
    stream."""
    generator, chunks = torch.Generator().manual_seed(place(pipe)), []
    arguments = {**ARGUMENTS, "output_type": "pt", "generator": generator, "async_decode": True}
    with pipe.stream(said(pipe, "a cat"), **arguments) as session:
        for chunk in session:
            chunks.append(chunk.frames[0])
            if place(pipe) == 0 and chunk.index == 2:
                break
    return torch.cat(chunks)


def by_a_tiny_decoder(pipe: LongLivePipeline) -> torch.Tensor:
    """Frames that every rank decodes for itself, and latents that it decodes by themselves."""
    decoder, latents = small_decoder(), noise(pipe, 2)
    frames = call(pipe, prompt=said(pipe, "a cat"), latents=latents, output_type="pt", decoder=decoder)[0]
    return torch.cat([frames, torch.as_tensor(pipe.decode_latents(torch.ones(1, 8, 4, 4, 4), "pt", decoder))[0]])


def switched_loras(pipe: LongLivePipeline) -> torch.Tensor:
    """A LoRA that every rank loads, and scales differently from the third chunk on."""
    chunks, generator = [], torch.Generator().manual_seed(place(pipe))
    with pipe.stream(said(pipe, "a cat"), num_frames=61, generator=generator, **ARGUMENTS) as session:
        for chunk in session:
            chunks.append(chunk.latents)
            if chunk.index == 1:
                pipe.transformer.set_adapters(["default"], [0.5])
    return torch.cat(chunks, dim=2)


def from_global_seed(pipe: LongLivePipeline) -> torch.Tensor:
    torch.manual_seed(place(pipe))
    return call(pipe, prompt="a cat", num_frames=29)


# -- cases -----------------------------------------------------------------------------------------------------------


def matrix() -> Iterator[tuple[str, Case]]:
    """Each two of a cache's dtype, a RoPE and a kind of stream meet once at least."""
    kinds = {"two videos, cuts, guidance": functools.partial(two_videos, guidance_scale=3.0), "switches": switches}
    for number, (cache, relative) in enumerate(itertools.product((None, "fp8", "nvfp4"), (False, True))):
        kind = list(kinds)[(number + number // 2) % 2]
        name = f"{cache or 'plain'} cache, {'relative' if relative else 'absolute'} RoPE: {kind}"
        yield name, (pipeline, functools.partial(kinds[kind], kv_cache_dtype=cache, relative_rope=relative))


# In chunks of two frames; the other golden rollouts have nothing that the streams below do not have.
GOLDEN: dict[str, Case] = {
    f"golden {name}": (functools.partial(pipeline_for, name), lambda pipe, n=name: call(pipe, **rollout_arguments(n)))
    for name in ("no_sink", "multi_shot_wide_sink")
}
FEATURES: dict[str, Case] = {
    "LoRA": (with_lora, two_videos),
    "LoRA, scaled in the stream": (with_lora, switched_loras),
    "NVFP4 weights": (lambda: in_four_bits("w4a16"), two_videos),
    "NVFP4 weights and activations": (lambda: in_four_bits("emulate"), beside_a_forward),
    "sinks that are no chunks": (odd_sinks, switches),
    "callback": (pipeline, with_callback),
    "callback that looks, NVFP4 activations": (lambda: in_four_bits("emulate"), with_callback_that_looks),
    "image": (pipeline, from_image),
    "video": (pipeline, from_video),
    "asynchronous": (pipeline, asynchronously),
    "blends": (pipeline, blends),
    "bytes": (pipeline, in_bytes),
    "tiny decoder": (pipeline, by_a_tiny_decoder),
    "global seed": (pipeline, from_global_seed),
    "compiled": (pipeline, compiled),
}
BRANCHES: dict[str, Case] = {
    "split branches: two videos, cuts": (pipeline, functools.partial(two_videos, guidance_scale=3.0)),
    "split branches: switches": (odd_sinks, functools.partial(switches, guidance_scale=3.0)),
    "split branches: blends": (odd_sinks, functools.partial(blends, guidance_scale=3.0)),
    "split branches: callback": (pipeline, with_callback),
}
CASES: dict[str, Case] = {**GOLDEN, **dict(matrix()), **FEATURES, **BRANCHES}


def cases_of(num_ranks: int) -> list[str]:
    """The names of the cases that are run by so many ranks."""
    if num_ranks == 2:
        return list(CASES)
    # Four ranks compute all of the golden chunks, of two frames, and what they share costs more than what they save.
    return [
        "golden multi_shot_wide_sink",
        "split branches: switches",  # both the branches and the frames
        "image",
        "plain cache, absolute RoPE: two videos, cuts, guidance",
        "nvfp4 cache, relative RoPE: switches",
    ]


def config_of(name: str, num_ranks: int) -> ContextParallelConfig:
    if name in BRANCHES:
        return StreamParallelConfig(ulysses_degree=num_ranks // 2, cfg_parallel=True)
    return ContextParallelConfig(ulysses_degree=num_ranks)


def share(pipe: LongLivePipeline, config: ContextParallelConfig) -> LongLivePipeline:
    torch.manual_seed(dist.get_rank())
    pipe.transformer.enable_parallelism(config=config)
    return pipe


def compare(name: str, config: ContextParallelConfig) -> dict[str, float]:
    make, run = CASES[name]
    torch.manual_seed(0)
    make_alone = pipeline if make is compiled else make  # which is the same, and takes seconds less
    expected = [run(make_alone()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(expected, src=0)
    began = time.perf_counter()
    found = run(share(make(), config))
    return {**differences(found, expected[0]), "seconds": time.perf_counter() - began}


def differences(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """The largest, and that of all numbers together as a share of what is expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference = (found - expected).float()
    return {"difference": difference.abs().max().item(), "error": (difference.norm() / expected.norm()).item()}


# -- what is sent ----------------------------------------------------------------------------------------------------


def stored_codes(exchange_dtype: str | None) -> dict[str, float]:
    """How many bytes of what the first layer's NVFP4 cache keeps of a finished chunk differ from what one process
    keeps."""

    def fill(model) -> list[torch.Tensor]:
        cache = model.create_kv_cache(2, 4, 4, window_size=12, sink_size=4, multi_shot_sink=True, dtype="nvfp4")
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):  # the last one evicts
            cache.begin_chunk(CHUNK_SIZE)
            cache.finish_chunk()
            latents = torch.randn(2, 8, CHUNK_SIZE, 4, 4, generator=generator)
            model(latents, torch.zeros(2), torch.ones(2, TEXT_LENGTH, 16), kv_cache=cache)
        return [part for store in (cache[0].key, cache[0].value) for part in store.parts]

    with torch.no_grad():
        expected = fill(pipeline().transformer)
        pipe = share(
            pipeline(), StreamParallelConfig(ulysses_degree=dist.get_world_size(), exchange_dtype=exchange_dtype)
        )
        found = fill(pipe.transformer)
    own = [part.chunk(dist.get_world_size(), 1)[dist.get_rank()] for part in expected]
    return {"differing": sum((a != b).sum().item() for a, b in zip(found, own, strict=True))}


def one_chunk(pipe: LongLivePipeline) -> torch.Tensor:
    """The first chunk of two: the last one of a video has no clean pass."""
    generator = torch.Generator().manual_seed(0)
    with pipe.stream("a cat", num_frames=29, kv_cache_dtype="nvfp4", generator=generator, **ARGUMENTS) as session:
        return next(session).latents


def pipeline_in(dtype: torch.dtype) -> LongLivePipeline:
    pipe = pipeline()
    pipe.transformer.to(dtype)
    return pipe


@functools.cache
def chunk_of_one_process(dtype: torch.dtype) -> torch.Tensor:
    return one_chunk(pipeline_in(dtype))


def measure_exchange(num_ranks: int, exchange_dtype: str | None, dtype: torch.dtype) -> dict[str, float]:
    """The bytes that a rank sends to others in the all-to-all of one chunk (2 steps and the clean pass, 2 layers), and
    how far the chunk then is from that of one process."""
    pipe, expected = pipeline_in(dtype), chunk_of_one_process(dtype)
    share(pipe, StreamParallelConfig(ulysses_degree=num_ranks, exchange_dtype=exchange_dtype))
    sent, exchange = [], dist.all_to_all_single

    def counted(output, input, *args, **kwargs):
        sent.append(input.nbytes * (num_ranks - 1) // num_ranks)
        return exchange(output, input, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        found = one_chunk(pipe)
    error = ((found - expected).norm() / expected.norm()).item()
    cache = pipe.transformer.create_kv_cache(1, 4, 4, window_size=12, sink_size=4, multi_shot_sink=True)
    return {"bytes": sum(sent), "messages": len(sent), "error": error, "cache": cache.num_bytes}


def main(path: Path, pattern: str = "") -> None:
    dist.init_process_group("gloo")
    results: dict[str, dict[str, float]] = {}

    def report(name: str, found: dict[str, float]) -> None:
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        results[name] = {key: max(one[key] for one in everywhere) for key in found}
        if pattern and dist.get_rank() == 0:
            print(name, results[name], flush=True)

    num_ranks = dist.get_world_size()
    for name in cases_of(num_ranks):
        if re.search(pattern, name):
            report(name, compare(name, config_of(name, num_ranks)))
    if num_ranks == 4 and re.search(pattern, "pairs"):
        report("pairs", compare(next(iter(FEATURES)), ContextParallelConfig(ulysses_degree=2)))
    for exchange_dtype in (None, "nvfp4"):
        if num_ranks == 2 and re.search(pattern, "codes"):
            report(f"codes sent as {exchange_dtype}", stored_codes(exchange_dtype))
    for exchange_dtype in EXCHANGE_DTYPES:
        for dtype in (torch.float32, torch.bfloat16) if num_ranks == 2 else (torch.float32,):
            name = f"exchange of {exchange_dtype or dtype}, network in {dtype}"
            if re.search(pattern, name):
                report(name, measure_exchange(num_ranks, exchange_dtype, dtype))
    if dist.get_rank() == 0:
        path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
