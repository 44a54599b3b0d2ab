"""Runs streams, layers and training as on a GPU, with Triton's interpreter, and as on a CPU, and compares the bits:
TRITON_INTERPRET=1 python -m tests.programs.compare_branches
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import nn

from longlive_diffusers import triton_launch
from longlive_diffusers.fused import layers
from longlive_diffusers.nvfp4 import NVFP4Linear
from longlive_diffusers.nvfp4.recipes import RECIPES, NVFP4Recipe
from longlive_diffusers.nvfp4.training import NVFP4TrainingLinear
from tests.support.nvfp4_models import small_transformer
from tests.support.tiny_pipeline import CHANNELS, CHUNK_SIZE, SIDE, TEXT_DIM, TEXT_LENGTH


WIDTH = 2  # of the streamed latents, which have a token for every 2x2: the interpreter takes a while for each
Case = tuple[str, Callable[[], list[torch.Tensor]]]


def stream(kind: torch.dtype | str, relative_rope: bool, num_heads: int = 2) -> list[torch.Tensor]:
    """The outputs of two videos streamed together, until frames are evicted: the shots of the one are not the other's,
    and halfway another text rewrites what is cached."""
    model = small_transformer(num_layers=1, num_attention_heads=num_heads)
    settings = {"window_size": 6, "sink_size": 2, "multi_shot_sink": True, "dtype": kind}
    cache = model.create_kv_cache(2, SIDE, WIDTH, **settings, relative_rope=relative_rope)
    generator = torch.Generator().manual_seed(1)
    chunks = torch.randn(4, 2, CHANNELS, CHUNK_SIZE, SIDE, WIDTH, generator=generator)
    texts = torch.randn(2, 2, TEXT_LENGTH, TEXT_DIM, generator=generator)
    outputs = []

    def forward(latents: torch.Tensor, timestep: float, text: torch.Tensor) -> None:
        timesteps = torch.full((2, latents.shape[2]), timestep)
        outputs.append(model(latents, timesteps, text, kv_cache=cache).sample)

    for index, latents in enumerate(chunks):
        text = texts[index // 2]
        if index == 2:
            for frames in cache.recache():
                clean = [
                    torch.stack([chunks[i // CHUNK_SIZE, sample, :, i % CHUNK_SIZE] for i in indices], dim=1)
                    for sample, indices in enumerate(frames)
                ]
                forward(torch.stack(clean), 0.0, text)
        cache.begin_chunk(CHUNK_SIZE, opens_shot=[index == 1, index == 2])
        forward(latents, 500.0, text)
        cache.finish_chunk()
        forward(latents, 0.0, text)
    return outputs


def linear_of(in_features: int, out_features: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features)


def few_outputs(backend: str) -> int:
    """As few outputs as a layer may have, since each row of its weight is a program of the interpreter."""
    return 16 if backend == "fp8" else 2


def layer(backend: str, rule: str, block: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """A layer's output, and the gradient of its input."""
    nvfp4 = NVFP4Linear.from_linear(
        linear_of(48, max(few_outputs(backend), block[0])),
        weight_scale_rule=rule,
        activation_scale_rule=rule,
        weight_block=block,
        backend=backend,
    )
    x = torch.randn(2, 1, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    with torch.enable_grad():
        y = nvfp4(x)
        y.square().sum().backward()
    return [y.detach(), x.grad]


def compiled_layer(backend: str) -> list[torch.Tensor]:
    """The output of a layer that is compiled in one graph."""
    torch._dynamo.reset()
    nvfp4 = NVFP4Linear.from_linear(linear_of(48, few_outputs(backend)), backend=backend)
    nvfp4.compile(fullgraph=True, backend="aot_eager")
    return [nvfp4(torch.randn(2, 48, generator=torch.Generator().manual_seed(1)))]


def training_step(recipe: NVFP4Recipe, dtype: torch.dtype) -> list[torch.Tensor]:
    """A layer's output, and the gradients of its input and its parameters."""
    nvfp4 = NVFP4TrainingLinear.from_linear(linear_of(16, 16), recipe).to(dtype)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    torch.manual_seed(2)  # of the noise
    with torch.enable_grad():
        y = nvfp4(x)
        y.square().sum().backward()
    return [y.detach(), x.grad, nvfp4.weight.grad, nvfp4.bias.grad]


def cases() -> Iterator[Case]:
    """The name of each case, and what computes its results.

    The interpreter takes seconds for a stream in 4 bits, which therefore has one head, and one kind of positions,
    whose kernels are the other's too. Layers differ by backend, rule and block, and have few rows, each of which is a
    program of the interpreter; each input is in one of the dtypes, by turns.
    """
    plain = [(torch.float32, False, 2), (torch.float32, True, 2)]
    for kind, relative_rope, num_heads in [("nvfp4", True, 1), ("fp8", False, 1), ("fp8", True, 2), *plain]:
        name = f"stream, {kind}, {'relative' if relative_rope else 'absolute'} RoPE, {num_heads} heads"
        yield name, lambda arguments=(kind, relative_rope, num_heads): stream(*arguments)
    dtypes = (torch.float32, torch.bfloat16)
    layers_of = itertools.product(("emulate", "w4a16", "fp8"), ("mse", "static_6"), ((1, 16), (16, 16)))
    for arguments, dtype in zip(layers_of, itertools.cycle((*dtypes, *reversed(dtypes))), strict=False):
        yield f"layer, {arguments}, {dtype}", lambda arguments=(*arguments, dtype): layer(*arguments)
    for backend in ("emulate", "w4a16", "fp8"):
        yield f"compiled layer, {backend}", lambda backend=backend: compiled_layer(backend)
    for recipe, dtype in zip(RECIPES.values(), itertools.cycle(dtypes), strict=False):
        yield f"training, {recipe.name} {dtype}", lambda arguments=(recipe, dtype): training_step(*arguments)


def as_on_a_gpu() -> AbstractContextManager:
    """Within this, Triton kernels compute what they compute on a GPU."""
    return mock.patch.object(triton_launch, "is_for_kernels", lambda device: True)


@torch.no_grad()
def compare() -> tuple[list[str], int]:
    """The names of the cases that differ, with the first result that does, and the number of all."""
    differing, total = [], 0
    for name, compute in cases():
        with as_on_a_gpu(), mock.patch.object(layers, "is_for_inference", lambda: False):  # no fused kernels
            found = compute()
        expected = compute()
        total += 1
        different = [index for index, pair in enumerate(zip(found, expected, strict=True)) if not torch.equal(*pair)]
        if different:
            differing.append(f"{name}: result {different[0]} of {len(expected)}")
    return differing, total


if __name__ == "__main__":
    differing, total = compare()
    print(f"{len(differing)} of {total} cases differ", *differing, sep="\n")
    raise SystemExit(bool(differing))
