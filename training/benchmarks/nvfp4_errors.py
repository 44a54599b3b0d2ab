"""Print tables of how much NVFP4 loses: python training/benchmarks/nvfp4_errors.py [--size 1024] [--seed 0]

The tables show relative L2 errors on random numbers of several kinds: of a round trip through the format, a linear
layer, attention over a KV cache, and the three matrix products of training. They say what the format and its rules can
do; what that means for videos, only videos can tell (`training/toy/evaluate.py`).
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from longlive_diffusers.benchmark.markdown import markdown_table
from longlive_diffusers.models.frame_store import FP8Frames, NVFP4Frames
from longlive_diffusers.nvfp4 import NVFP4Linear, quantize
from longlive_diffusers.nvfp4.recipes import RECIPES
from longlive_diffusers.nvfp4.rules import RULES
from longlive_diffusers.nvfp4.training import NVFP4TrainingLinear


CPU = torch.device("cpu")
Table = tuple[str, list[str], list[list[str]]]


def relative(result: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{((result - expected).norm() / expected.norm()).item():.4f}"


def with_outliers(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Draw normal numbers, with one channel in a hundred twenty times as large."""
    x = torch.randn(shape, generator=generator)
    x[:, ::100] *= 20
    return x


DISTRIBUTIONS: dict[str, Callable[[tuple[int, int], torch.Generator], torch.Tensor]] = {
    "N(0, 1)": lambda shape, generator: torch.randn(shape, generator=generator),
    "U(-1, 1)": lambda shape, generator: 2 * torch.rand(shape, generator=generator) - 1,
    "Laplace": lambda shape, generator: (
        torch.empty(shape).exponential_(generator=generator) * (2 * torch.rand(shape, generator=generator) - 1).sign()
    ),
    "N, 1 % of channels x 20": with_outliers,
}


def round_trip(size: int, seed: int) -> Table:
    """Quantize and dequantize."""
    rows = []
    for name, draw in DISTRIBUTIONS.items():
        x = draw((size, size), torch.Generator().manual_seed(seed)).bfloat16()
        errors = [relative(quantize(x, rule).dequantize(torch.float32), x.float()) for rule in RULES]
        wide = relative(quantize(x, "static_6", (16, 16)).dequantize(torch.float32), x.float())
        rows.append([name, *errors, wide])
    return f"Round trip, {size} x {size}", ["", *RULES, "static_6, 16x16"], rows


def linear_layer(size: int, seed: int) -> Table:
    """`x W^T`, x ~ N(0, 1), W ~ N(0, 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size // 2, size, generator=generator)
    linear = nn.Linear(size, size, bias=False).requires_grad_(False)
    linear.weight.copy_(0.02 * torch.randn(size, size, generator=generator))
    rules = ("static_6", "mse")
    rows = []
    for backend, what in (("emulate", "W4A4"), ("w4a16", "W4A16"), ("fp8", "W4 in FP8 products (W8A8)")):
        layers = [
            NVFP4Linear.from_linear(linear, weight_scale_rule=rule, activation_scale_rule=rule, backend=backend)
            for rule in rules
        ]
        rows.append([f"{what}, backend '{backend}'", *(relative(layer(x), linear(x)) for layer in layers)])
    return f"Linear layer, {size} -> {size}", ["", *rules], rows


def kv_cache(seed: int) -> Table:
    """Attention of 1024 tokens, with 4 heads of 128 channels, over stored keys and values."""
    shape = (1, 4, 1, 1024, 128)
    rows = []
    for name, bias, outliers in (
        ("keys N(0, 1)", 0.0, 0.0),
        ("keys with offsets", 2.0, 0.0),
        ("4 outliers", 0.0, 10.0),
    ):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        key = key + bias * torch.randn(4, 1, 1, 128, generator=generator)
        key[..., :4] += outliers
        exact = attend(query, key, value)
        stores = {
            "nvfp4, as it is": (NVFP4Frames(shape, CPU, for_keys=False), NVFP4Frames(shape, CPU, for_keys=False)),
            "nvfp4, centered": (NVFP4Frames(shape, CPU, for_keys=True), NVFP4Frames(shape, CPU, for_keys=False)),
            "fp8": (FP8Frames(shape, CPU, for_keys=True), FP8Frames(shape, CPU, for_keys=False)),
        }
        errors = [relative(attend(query, through(k, key), through(v, value)), exact) for k, v in stores.values()]
        rows.append([name, *errors])
    return "Attention over stored keys and values", ["", *stores], rows


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query[:, :, 0], key[:, :, 0], value[:, :, 0])


def through(store: NVFP4Frames | FP8Frames, states: torch.Tensor) -> torch.Tensor:
    slot = torch.zeros(1, 1, dtype=torch.long)
    store.write(slot, slot, states.transpose(1, 2))
    target = torch.empty_like(states)
    store.read_into(target, 1)
    return target


def training(size: int, seed: int) -> Table:
    """The three products of a layer, with gradients that have heavy tails."""
    rows = []
    for name, recipe in RECIPES.items():
        torch.manual_seed(seed)
        x = torch.randn(size, size, requires_grad=True)
        linear = nn.Linear(size, size, bias=False)
        nn.init.normal_(linear.weight, std=0.02)
        gradient = torch.randn(size, size) * torch.exp(torch.randn(size, size))
        y = NVFP4TrainingLinear.from_linear(linear, recipe)(x)
        y.backward(gradient)
        weight, inputs = linear.weight.detach(), x.detach()
        pairs = (
            (y.detach(), inputs @ weight.T),
            (x.grad, gradient @ weight),
            (linear.weight.grad, gradient.T @ inputs),
        )
        rows.append([name, *(relative(*pair) for pair in pairs)])
    return f"Training, {size} tokens, {size} -> {size}", ["recipe", "y", "dx", "dW"], rows


def as_markdown(table: Table) -> str:
    title, header, rows = table
    return f"**{title}**\n\n{markdown_table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how much NVFP4 loses.")
    parser.add_argument(
        "--size",
        type=int,
        default=1024,
        help="The number of rows and of columns of the matrices, a multiple of 32 (default: %(default)s).",
    )
    parser.add_argument("--seed", type=int, default=0, help="The seed of the random numbers (default: 0).")
    arguments = parser.parse_args()
    if arguments.size < 32 or arguments.size % 32:
        parser.error(f"--size must be a multiple of 32, got {arguments.size}")
    size, seed = arguments.size, arguments.seed
    for table in (round_trip(size, seed), linear_layer(size, seed), kv_cache(seed), training(size, seed)):
        print("\n" + as_markdown(table), flush=True)


if __name__ == "__main__":
    main()
