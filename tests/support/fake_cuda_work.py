"""How much work the 5B model is, counted on a fake GPU: a forward, a chunk, its decoding, a training step, layers."""

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from longlive_diffusers.models.streaming_vae import StreamingDecoder
from longlive_diffusers.nvfp4.recipes import RECIPES
from longlive_diffusers.pipelines.speed import optimize
from tests.support.fake_backward import backward
from tests.support.fake_cuda import Host, on_gpu
from tests.support.fake_cuda_checks import (
    BLACKWELL,
    HOPPER,
    IN_FEATURES,
    OUT_FEATURES,
    ROWS,
    SIZE,
    fake_pipeline,
    fake_text_encoder,
    fake_transformer,
    fake_vae,
    layer,
    training_layer,
    training_step,
)
from tests.support.traffic import Totals, Traffic


CLIP_LENGTHS = (16, 32, 96, 192)


class Work:
    """What a piece of code does on a GPU: FLOPs of matrix products, bytes, kernels, and where the CPU waits for it."""

    def __init__(self):
        self.flops, self.totals, self.waits = 0, Totals(), Counter()

    def measure(self, call: Callable[[], object], host: Host) -> None:
        host.waits.clear()
        with FlopCounterMode(display=False, custom_mapping=product_flops()) as flops, Traffic("cuda") as traffic:
            call()
        self.flops, self.totals, self.waits = flops.get_total_flops(), traffic.totals, Counter(host.waits)

    def cells(self) -> list[str]:
        totals = self.totals
        sizes = [f"{size / 1e9:,.1f}" for size in (totals.num_bytes, totals.wide_bytes)]
        return [f"{self.flops / 1e12:,.2f}", *sizes, f"{totals.kernels:,}", str(self.waits.total())]


def product_flops() -> dict:
    """The products that PyTorch's counter does not know."""

    def in_fp8(codes, scales, other_codes, *args, out_shape=None, **kwargs) -> int:
        return 2 * codes[0] * codes[1] * other_codes[0]

    def in_nvfp4(codes, scales, tensor_scale, other_codes, *args, out_shape=None, **kwargs) -> int:
        return 2 * codes[0] * 2 * codes[1] * other_codes[0]

    def with_gelu(bias, rows, weight, *args, out_shape=None, **kwargs) -> int:
        return 2 * rows[0] * rows[1] * weight[1]

    return {
        torch.ops.aten._addmm_activation: with_gelu,
        torch.ops.longlive_diffusers.fp8_matmul: in_fp8,
        torch.ops.longlive_diffusers.nvfp4_matmul: in_nvfp4,
    }


def full_window_forward(kv_cache_dtype: torch.dtype | str | None, speed: str | None = None) -> Callable[[], object]:
    """Return a forward of a chunk that attends to a full window, of a model that is optimized for `speed`."""
    model = fake_transformer()
    if speed is not None:
        optimize(model, None, speed, torch.device("cuda"))
    cache = model.create_kv_cache(
        1,
        SIZE.height,
        SIZE.width,
        window_size=SIZE.window_size,
        sink_size=SIZE.sink_size,
        multi_shot_sink=True,
        dtype=kv_cache_dtype,
    )
    for _ in range(SIZE.chunks_to_fill + 1):
        cache.begin_chunk(SIZE.chunk_size)
        cache.finish_chunk()
    shape = (1, SIZE.transformer["in_channels"], SIZE.chunk_size, SIZE.height, SIZE.width)
    states = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    timestep = torch.zeros(1, SIZE.chunk_size, device="cuda")
    text = torch.zeros(1, SIZE.text_tokens, SIZE.transformer["text_dim"], device="cuda", dtype=torch.bfloat16)
    cache.begin_chunk(SIZE.chunk_size)
    forward = torch.no_grad()(lambda: model(states, timestep, text, kv_cache=cache, return_dict=False))
    forward()  # the keys and values of the text are there from now on
    return forward


def next_chunk(**options) -> Callable[[], object]:
    """Return the making of a chunk's latents, in a stream whose window is full."""
    pipe = fake_pipeline(SIZE.transformer["num_layers"], SIZE.vae)
    session = pipe.stream(prompt="a cat runs", generator=torch.Generator(), output_type="latent", **options)
    for _ in range(SIZE.chunks_to_fill + 1):
        next(session)
    return lambda: next(session)


def text_of_a_prompt() -> Callable[[], object]:
    encoder = fake_text_encoder()
    tokens = torch.zeros(1, SIZE.text_tokens, device="cuda", dtype=torch.long)
    return torch.no_grad()(lambda: encoder(tokens, torch.ones_like(tokens)))


def decoded_chunk() -> Callable[[], object]:
    """Return the decoding of a chunk that is neither the first nor the second of its video."""
    decoder = StreamingDecoder(fake_vae(SIZE.vae))
    shape = (1, SIZE.transformer["in_channels"], SIZE.chunk_size, SIZE.height, SIZE.width)
    chunk = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        decoder.decode(chunk)
    return lambda: decoder.decode(chunk)


def whole_training_step(frames: int) -> Callable[[], object]:
    """Return a forward and backward of a clip, with gradient checkpointing."""
    model = fake_transformer(torch.float32).train().requires_grad_(True)
    model.enable_gradient_checkpointing()
    loss = training_step(model, frames)
    return lambda: backward(loss())


def plain_layer() -> Callable[[], object]:
    linear = on_gpu(lambda: torch.nn.Linear(IN_FEATURES, OUT_FEATURES), torch.bfloat16)
    states = torch.zeros(ROWS, IN_FEATURES, device="cuda", dtype=torch.bfloat16)
    return lambda: linear(states)


def all_work() -> Iterator[tuple[str, tuple[int, int], Callable[[], Callable[[], object]]]]:
    """The cases: a name, the GPU's compute capability, and what prepares the piece of code that is measured."""
    yield "text encoder, a prompt", HOPPER, text_of_a_prompt
    for name, dtype in (("bfloat16", torch.bfloat16), ("FP8", "fp8"), ("NVFP4", "nvfp4")):
        yield f"forward, full window, cache in {name}", HOPPER, lambda dtype=dtype: full_window_forward(dtype)
    for speed in ("exact", "fast"):
        name = f"the same, cache in bfloat16, speed '{speed}'"
        yield name, HOPPER, lambda speed=speed: full_window_forward(torch.bfloat16, speed)
    yield "chunk: 4 steps, solver, clean pass", HOPPER, lambda: next_chunk(num_frames=SIZE.num_frames(8))
    yield "the same, relative RoPE", HOPPER, next_chunk
    yield "decode a chunk", HOPPER, decoded_chunk
    yield "training step, 32 latent frames", HOPPER, lambda: whole_training_step(32)
    yield f"linear layer {ROWS} x {IN_FEATURES} x {OUT_FEATURES}, bfloat16", HOPPER, plain_layer
    for backend in ("fp8", "w4a16", "emulate"):
        yield f"the same, NVFP4 by {backend}", HOPPER, lambda backend=backend: layer(backend)
    yield "the same, NVFP4 by scaled_mm", BLACKWELL, lambda: layer("scaled_mm")
    for recipe in RECIPES:
        yield f"the same, forward and backward, {recipe}", HOPPER, lambda recipe=recipe: training_layer(recipe)


def kept_bytes(loss: Callable[[], torch.Tensor], model: torch.nn.Module) -> int:
    """Return the bytes that autograd keeps for the backward besides the weights, each storage once."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage)  # held, so that its place is not taken by another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def kept_per_layer(frames: int, *, checkpointing: bool) -> int:
    """Return the bytes that one more layer keeps."""
    kept = []
    for num_layers in (1, 2):
        model = fake_transformer(torch.float32, num_layers=num_layers).train().requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        kept.append(kept_bytes(training_step(model, frames), model))
    return kept[1] - kept[0]


def kept_rows() -> Iterator[list[str]]:
    for frames in CLIP_LENGTHS:
        plain, checkpointed = (kept_per_layer(frames, checkpointing=checkpointing) for checkpointing in (False, True))
        sizes = [f"{size / frames / 2**20:.1f}" for size in (plain, checkpointed)]
        yield [str(frames), f"{plain / 2**30:.2f}", *sizes]
