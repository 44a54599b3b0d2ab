"""Compares the fused kernels, in Triton's interpreter, with the plain functions whose place they take:
TRITON_INTERPRET=1 python -m tests.programs.compare_fused

Sums are made in another order, hence results differ by rounding. Each case is printed with its largest difference, as
a part of the largest number, and with what it may be.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from longlive_diffusers.fp8 import operators as fp8_operators
from longlive_diffusers.fp8.e4m3 import to_codes
from longlive_diffusers.fp8.rows import FP8Rows
from longlive_diffusers.fused import layers, operators
from longlive_diffusers.fused.decode import decode_heads
from longlive_diffusers.fused.feed_forward import gelu_in_fp8
from longlive_diffusers.fused.residual import add, add_and_norm, add_and_norm_in_fp8, norm, norm_in_fp8
from longlive_diffusers.models import norms_of_inputs
from longlive_diffusers.models.rotary import apply_rotary, rotary_embedding
from longlive_diffusers.models.sparse_attention import (
    attend_to_blocks,
    plan_blocks,
    take_blocks,
    take_blocks_of_both,
)
from longlive_diffusers.nvfp4.fp8_linear import FP8Linear, can_be_fp8
from tests.programs.compare_branches import WIDTH, as_on_a_gpu, stream
from tests.support.nvfp4_models import small_transformer
from tests.support.tiny_pipeline import CHUNK_SIZE, SIDE, TEXT_DIM, TEXT_LENGTH


ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # the interpreter cuts bfloat16 off where a GPU rounds
STREAM = 1e-5
NEIGHBORS = 1e-2
STEP_OF_FP8 = 2**-3
Case = tuple[str, float, list[torch.Tensor], list[torch.Tensor]]


def norms(device: torch.device) -> Iterator[Case]:
    """Two videos of three frames with two tokens; widths that are powers of two and not."""
    for dim, dtype in itertools.product((8, 48), ROUNDING):
        generator = torch.Generator().manual_seed(dim)
        hidden_states = 5 * torch.randn(2, 6, dim, generator=generator) + 3
        update = torch.randn(2, 6, dim, generator=generator).to(dtype)
        modulation = torch.randn(2, 3, 3, 1, dim, generator=generator)
        gate, weight, bias = modulation.unbind(2)  # of other strides than their shapes
        affine = torch.randn(2, dim, generator=generator)

        def run(device, values=(hidden_states, update, gate, weight, bias, *affine), dtype=dtype):
            hidden_states, update, gate, weight, bias, row, other = (value.to(device) for value in values)
            return [
                norm(hidden_states.to(dtype), weight, bias, eps=1e-6),
                *add_and_norm(hidden_states, update, gate, weight, bias, eps=1e-6),
                *add_and_norm(hidden_states.to(dtype), update, None, row, other, eps=1e-6),
                add(hidden_states, update, gate, dtype=dtype),
            ]

        expected = run("cpu")
        with as_on_a_gpu():
            found = run(device)
        yield f"norm, width {dim}, {dtype}", ROUNDING[dtype], found, expected


def norms_in_fp8(device: torch.device) -> Iterator[Case]:
    """One kernel gives the bits of the two, norm and quantization: two videos of two frames with two tokens."""
    for dim in (128, 144):
        generator = torch.Generator().manual_seed(dim)
        hidden_states, update = (torch.randn(2, 4, dim, generator=generator).to(device) for _ in range(2))
        gate, weight, bias = torch.randn(3, 2, 2, 1, dim, generator=generator).to(device)
        affine = torch.randn(2, dim, generator=generator).to(device)
        states, update = hidden_states.bfloat16(), update.bfloat16()
        found, expected = [], []
        with as_on_a_gpu():
            rows, normed = (f(states, weight, bias, eps=1e-6) for f in (norm_in_fp8, norm))
            found += parts_of(rows)
            expected += parts_of(FP8Rows.of(normed))
            for values in ((hidden_states, update, gate, weight, bias), (states, update, None, *affine)):
                (added, rows), (expected_sum, normed) = (
                    f(*values, eps=1e-6) for f in (add_and_norm_in_fp8, add_and_norm)
                )
                found += [added, *parts_of(rows)]
                expected += [expected_sum, *parts_of(FP8Rows.of(normed))]
        yield f"norm in FP8, width {dim}", 0.0, found, expected


def parts_of(rows: FP8Rows) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.codes, rows.scale


def gelus_in_fp8(device: torch.device) -> Iterator[Case]:
    """GELU of rows of all sizes; in float32, where the interpreter cuts nothing off, by the code."""
    x = 3 * torch.randn(5, 144, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 5)[:, None]
    x[2, :3] = torch.tensor([0.0, -200.0, 1e5])
    for dtype, bound in ((torch.float32, 0.0 if device.type == "cpu" else STEP_OF_FP8), (torch.bfloat16, STEP_OF_FP8)):
        with as_on_a_gpu():
            found = gelu_in_fp8(x.to(dtype).to(device))
        expected = FP8Rows.of(F.gelu(x.to(dtype).double(), approximate="tanh").to(dtype))
        pairs = [(rows.codes.cpu().float() * rows.scale.cpu()).unbind() for rows in (found, expected)]
        yield f"GELU in FP8, {dtype}", bound, *map(list, pairs)


def network_in_fp8() -> Iterator[Case]:
    """A chunk of two videos by a network of one block in FP8, whose norms quantize; and one whose norms do not."""
    model = small_transformer(num_layers=1).bfloat16()
    for module in model.blocks.modules():
        for name, child in list(module.named_children()):
            if can_be_fp8(child):
                setattr(module, name, FP8Linear(child))
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, TEXT_LENGTH, TEXT_DIM, generator=generator).bfloat16()
    latents = torch.randn(2, model.config.in_channels, CHUNK_SIZE, SIDE, WIDTH, generator=generator).bfloat16()
    results, runs = [], []
    for reads in (norms_of_inputs.reads_fp8, lambda reader, x: False):
        cache = model.create_kv_cache(2, SIDE, WIDTH, window_size=4, sink_size=0, multi_shot_sink=False)
        cache.begin_chunk(CHUNK_SIZE)
        with (
            as_on_a_gpu(),
            mock.patch.object(norms_of_inputs, "reads_fp8", reads),
            launches_of(operators) as run,
            launches_of(fp8_operators) as others,
        ):
            results.append([model(latents, torch.full((2,), 500.0), text, kv_cache=cache).sample])
        runs.append((sorted(run), sorted(others)))
    in_fp8, apart = runs
    assert in_fp8[0] == sorted([*apart[0], "gelu_in_fp8_kernel"]), in_fp8
    # Keys and values of the text, and what two attentions and, without fusion, three norms and GELU give.
    assert (len(in_fp8[1]), len(apart[1])) == (3, 7), runs
    yield "network in FP8", ROUNDING[torch.bfloat16], *results


@contextmanager
def launches_of(module) -> Iterator[list[str]]:
    """The names of the kernels that a module of operators launches meanwhile."""
    names, launch = [], module.launch

    def noted(kernel: str, *arguments, **constants) -> None:
        names.append(kernel)
        launch(kernel, *arguments, **constants)

    with mock.patch.object(module, "launch", noted):
        yield names


def rotations(device: torch.device) -> Iterator[Case]:
    """Two videos of two frames with six tokens, in a cache of three frames whose slots are not in order."""
    heads, head_dim = 3, 8
    dim = heads * head_dim
    slots, raw_slots = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0, 1], [1, 0]])
    token_slots = (slots[..., None] * 6 + torch.arange(6)).flatten(1)
    # Each two of a dtype, kinds of positions and what is kept meet once.
    kinds = itertools.product(ROUNDING, (False, True))
    for (dtype, own_positions), keeps_raw in zip(kinds, (False, True, True, False), strict=True):
        generator = torch.Generator().manual_seed(1)
        projected = torch.randn(2, 12, 3 * dim, generator=generator).to(dtype)
        query, key, value = projected.chunk(3, dim=-1)
        query = query.transpose(0, 1).contiguous().transpose(0, 1)  # which has to be copied
        norms = [nn.RMSNorm(dim, eps=1e-6) for _ in range(2)]
        for own in norms:
            own.weight.data.normal_(generator=generator)
        times = torch.tensor([[5.0, 6.0], [0.25, 90.0]])
        rotary = rotary_embedding(times if own_positions else times[:1], 2, 3, head_dim)

        cache = torch.zeros(2, 2, heads, 24, head_dim, dtype=dtype)[:, :, :, :18]  # keys and values; not all visible
        raw = torch.zeros(2, heads, 2, 6, head_dim, dtype=dtype)
        found_cache, found_raw = cache.to(device, copy=True), raw.to(device, copy=True)
        rotated = operators.norm_rotate_and_write(
            *(states.to(device) for states in (query, key, value)), *(own.weight.detach().to(device) for own in norms),
            1e-6, rotary.to(device), found_cache[0], found_cache[1], token_slots.to(device),
            found_raw if keeps_raw else None, raw_slots.to(device) if keeps_raw else None,
        )  # fmt: skip

        normed = [
            own(states.float()).unflatten(-1, (heads, -1)) for own, states in zip(norms, (query, key), strict=True)
        ]
        samples = torch.arange(2)[:, None]
        cache[0, samples, :, token_slots] = apply_rotary(normed[1], rotary).to(dtype)
        cache[1, samples, :, token_slots] = value.unflatten(-1, (heads, -1))
        if keeps_raw:
            raw[samples, :, raw_slots] = normed[1].unflatten(1, (2, 6)).transpose(2, 3).to(dtype)
        expected = [apply_rotary(normed[0], rotary).to(dtype), cache, raw]
        name = (
            f"rotation, {dtype}, {'own' if own_positions else 'shared'} positions, {'raw keys' if keeps_raw else ''}"
        )
        yield name, ROUNDING[dtype], [rotated, found_cache, found_raw], expected


def codes(device: torch.device) -> Iterator[Case]:
    """The same into a cache of E4M3, whose codes may be neighbors where numbers lie between them."""
    heads, head_dim = 3, 8
    token_slots = torch.randperm(18, generator=torch.Generator().manual_seed(0))[:12].expand(2, -1)
    for dtype in ROUNDING:
        generator = torch.Generator().manual_seed(1)
        query, key, value = (torch.randn(2, 12, heads * head_dim, generator=generator).to(dtype) for _ in range(3))
        value[0, 0, 0] = 1e4  # is cut off
        weight = torch.randn(2, heads * head_dim, generator=generator)
        rotary = rotary_embedding(torch.tensor([[5.0, 6.0]]), 2, 3, head_dim)
        factors = 2.0 ** torch.randint(-2, 5, (3, 2, heads), generator=generator)
        cache = torch.zeros(2, 2, heads, 24, head_dim, dtype=torch.uint8)[:, :, :, :18]
        found = cache.to(device, copy=True)
        rotated = operators.norm_rotate_and_write(
            *(states.to(device) for states in (query, key, value)), *weight.to(device), 1e-6, rotary.to(device),
            *found, token_slots.to(device), None, None, *factors.to(device),
        )  # fmt: skip
        normed = [
            nn.functional.rms_norm(states.float(), states.shape[-1:], own, 1e-6).unflatten(-1, (heads, -1))
            for own, states in zip(weight, (query, key), strict=True)
        ]
        samples = torch.arange(2)[:, None]
        turned = [*(apply_rotary(states, rotary) for states in normed), value.unflatten(-1, (heads, -1))]
        expected, *others = (to_codes(own, by[:, None, :, None]) for own, by in zip(turned, factors, strict=True))
        for part, own in zip(cache, others, strict=True):
            part[samples, :, token_slots] = own
        yield f"rotation to codes, {dtype}", NEIGHBORS, [rotated, found], [expected, cache]
        decoded = operators.decode_heads(expected.to(device), factors[0].to(device), dtype)
        yield f"codes to numbers, {dtype}", 0.0, [decoded], [decode_heads(expected, factors[0], dtype)]


def blocks(device: torch.device) -> Iterator[Case]:
    """Two videos, whose two strips choose two of three blocks of each head; a block is two programs, the last of which
    is not full. Copies are exact. The keys' heads have room between them, the values' do not."""
    size = 20
    chosen = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1], [1, 2], [0, 2], [0, 1], [1, 2]]).view(2, 2, 2, 2)
    for dtype in ROUNDING:
        generator = torch.Generator().manual_seed(2)
        key, value = (torch.randn(2, 2, tokens, 256, generator=generator).to(dtype) for tokens in (70, 60))
        visible = [states.transpose(1, 2)[:, :60] for states in (key, value)]
        expected = [take_blocks(states, chosen, size).transpose(1, 2) for states in visible]
        on_device = [states.to(device).transpose(1, 2)[:, :60] for states in (key, value)]
        found = take_blocks_of_both(*on_device, chosen.to(device), size)
        yield f"blocks, {dtype}", 0.0, list(found), expected
    query, states = torch.randn(2, 16, 2, 8, generator=generator), torch.randn(2, 48, 2, 8, generator=generator)
    plan = plan_blocks([[True, False, True], [False, True, True]], 16, 0.5)
    assert plan is not None
    expected = attend_to_blocks(query, states, -states, plan)
    plan = replace(plan, is_always_seen=plan.is_always_seen.to(device))
    query, states = query.to(device), states.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    with as_on_a_gpu():
        found = attend_to_blocks(query, states, -states, plan)
    yield "attention to blocks", STREAM, [found], [expected]


def streams() -> Iterator[Case]:
    """Whole streams: two videos with other shots, evictions, a prompt that changes."""
    for relative_rope, num_heads in ((False, 1), (True, 2)):
        expected = stream(torch.float32, relative_rope, num_heads)
        with as_on_a_gpu():
            found = stream(torch.float32, relative_rope, num_heads)
        name = f"stream, {'relative' if relative_rope else 'absolute'} RoPE, {num_heads} heads"
        yield name, STREAM, found, expected
    expected = stream("fp8_attention", False)
    with as_on_a_gpu():
        found = stream("fp8_attention", False)
    yield "stream, attention in FP8", NEIGHBORS, found, expected


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a part of the largest number; of codes, the part that differs, which all are next to each
    other."""
    if found.dtype != torch.uint8:
        return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    steps = (found.int() - expected.int()).abs()
    return steps.bool().float().mean().item() if steps.max() <= 1 else float("inf")


@torch.no_grad()
def compare(device: torch.device) -> list[str]:
    """Print each case, and return the names of those that differ by more than they may."""
    differing = []
    cases = [*norms(device), *norms_in_fp8(device), *gelus_in_fp8(device), *rotations(device), *codes(device)]
    cases += blocks(device)
    if device.type == "cpu":
        cases += [*network_in_fp8(), *streams()]
    for name, bound, found, expected in cases:
        error = max(difference(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))
        print(f"{name}: {error:.1e}, at most {bound:.1e}")
        if not error <= bound:
            differing.append(name)
    return differing


@torch.no_grad()
def count_launches() -> int:
    """How often a stream's forwards run a fused kernel: none, if the functions never chose one."""
    runs = []
    with as_on_a_gpu(), mock.patch.object(operators, "launch", lambda kernel, *rest, **constants: runs.append(kernel)):
        stream(torch.float32, False)
    return len(runs)


if __name__ == "__main__":
    assert layers.uses_fused_kernels(torch.zeros(1)) is False  # on a CPU, unless told otherwise
    differing = compare(torch.device("cpu"))
    assert count_launches() > 0
    raise SystemExit(bool(differing))
