"""The Triton kernels of the VAE's decoder. Compare them with plain PyTorch, by themselves and in a stream of chunks:

    TRITON_INTERPRET=1 python -m tests.programs.wan_decoder_kernel

or compile them for GPUs that need not be there: python -m tests.programs.wan_decoder_kernel 90 100
"""

import itertools
import sys
from collections.abc import Iterator
from unittest import mock

import torch
import triton
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D
from torch.library import opcheck
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longlive_diffusers import StreamingDecoder, triton_launch
from longlive_diffusers.models.wan_decoder import kernels, norm_silu, operators
from longlive_diffusers.models.wan_decoder.operators import tile
from longlive_diffusers.models.wan_decoder.pending_sum import PendingSum
from longlive_diffusers.models.wan_decoder.upsample import add_repeated
from tests.support.tiny_vae import tiny_vae, wan_2_1_vae


# What is added before the norm: a bias, a shortcut; and whether the sum is needed.
TERMS = [(False, False, False), (True, False, False), (True, True, True), (True, True, False), (False, True, True)]
SHAPES = [(1, 1, 2, 3, 8), (2, 3, 5, 7, 12), (1, 4, 3, 3, 96), (1, 2, 1, 1, 1024), (2, 1, 3, 2, 160)]
# Channels of a block's input and output, and the repetitions in time.
REPETITIONS = [(8, 8, 2), (16, 8, 1), (8, 16, 1), (12, 6, 2), (8, 12, 1)]
# Triton's interpreter does not always round to the nearest number of 16 bits, but to one beside it.
STEPS = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def error(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """In units of the dtype's steps; infinite unless the same elements are NaN."""
    if found.dtype != dtype or found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return torch.inf
    difference = (found.double() - expected.double()).abs()
    return (difference / (STEPS[dtype] * expected.double().abs().clamp_min(2**-6))).nan_to_num(0).max().item()


def error_of_norm(shape: tuple[int, ...], dtype: torch.dtype, terms: tuple[bool, bool, bool]) -> float:
    """The largest of all results; that of earlier frames is infinite unless they are the same."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(shape[0], 2, *shape[2:], generator=generator).to(dtype)
    frames = (3 * torch.randn(shape, generator=generator)).to(dtype)
    frames[0, 0, 0, 0] = 0
    frames[0, -1, -1, -1, -1] = torch.nan
    gamma, bias = torch.randn(2, shape[-1], 1, 1, 1, generator=generator).to(dtype)
    shortcut = torch.randn(shape, generator=generator).to(dtype)
    has_bias, has_shortcut, returns_sum = terms
    bias, shortcut = bias.flatten() if has_bias else None, shortcut if has_shortcut else None
    joined, after, total = operators.norm_silu_after(kept, frames.clone(), gamma, bias, shortcut, returns_sum)
    expected_total = frames.float()
    for term in (bias, shortcut):
        expected_total = expected_total if term is None else expected_total + term.float()
    expected, _ = norm_silu.norm_silu_after(kept.float(), PendingSum(expected_total), gamma.float())
    if not torch.equal(joined[:, :2], kept) or not torch.equal(after.nan_to_num(), joined[:, -2:].nan_to_num()):
        return torch.inf
    return max(error(joined, expected, dtype), error(total, expected_total, dtype) if returns_sum else total.numel())


def error_of_repeated(repetition: tuple[int, int, int], first: bool, dtype: torch.dtype) -> float:
    """Of a convolution's bias and a block's input, repeated."""
    module, generator = DupUp3D(*repetition, factor_s=2), torch.Generator().manual_seed(0)
    frames = torch.randn(2, 1 if first else 3, 3, 5, repetition[0], generator=generator).to(dtype)
    count = 1 if first else frames.shape[1] * module.factor_t
    doubled = torch.randn(2, count, 6, 10, repetition[1], generator=generator).to(dtype)
    bias = torch.randn(repetition[1], generator=generator).to(dtype)
    expected = add_repeated(PendingSum(doubled.float() + bias.float()), module, frames.float(), first).frames
    with running_kernels():
        found = add_repeated(PendingSum(doubled, bias), module, frames, first).add_up()
    return error(found, expected, dtype)


def error_of_sum(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Of a bias alone, and with a shortcut."""
    bias, errors = torch.randn(shape[-1], generator=torch.Generator().manual_seed(1)).to(dtype), []
    for shortcut in (None, torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)):
        frames = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        expected = frames.float() + bias.float() + (0 if shortcut is None else shortcut.float())
        pending = PendingSum(frames, bias, shortcut)
        errors.append(error(pending.add_up(), expected, dtype))
        assert not pending.is_pending
    return max(errors)


def running_kernels(runs: bool = True):
    """Have kernels run on a CPU, or plain PyTorch."""
    return mock.patch.object(triton_launch, "is_for_kernels", lambda device: runs)


def error_of_a_stream(make_vae, batch: int) -> float:
    """Of pixels in float32, between a decoder that runs the kernels and one that does not."""
    vae, pixels = make_vae(), []
    for name, parameter in vae.decoder.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # a bias that is left out, or added twice, is to be seen
    latents = torch.randn(batch, 8, 4, 1, 2, generator=torch.Generator().manual_seed(0))
    for runs_kernels in (True, False):
        with running_kernels(runs_kernels):
            decoder = StreamingDecoder(vae)
            pixels.append(torch.cat([decoder.decode(chunk) for chunk in latents.split([1, 1, 2], dim=2)], dim=2))
    return (pixels[0] - pixels[1]).abs().max().item()


def errors() -> Iterator[tuple[str, float]]:
    for shape, dtype in itertools.product(SHAPES, STEPS):
        yield f"sum of {shape} {dtype}", error_of_sum(shape, dtype)
        for terms in TERMS if dtype == torch.float32 else TERMS[2:3]:
            yield f"norm of {shape} {dtype} {terms}", error_of_norm(shape, dtype, terms)
    for repetition, first in itertools.product(REPETITIONS, (False, True)):
        yield f"repeated {repetition} {first}", error_of_repeated(repetition, first, torch.float32)
    yield "repeated in 16 bits", error_of_repeated(REPETITIONS[0], False, torch.bfloat16)
    for make_vae, batch in ((tiny_vae, 1), (wan_2_1_vae, 2)):
        yield f"stream of {make_vae.__name__}", error_of_a_stream(make_vae, batch) / 1e-5


def compare() -> list[str]:
    """What differs by more than it may."""
    frames, gamma = torch.randn(1, 3, 2, 2, 8), torch.ones(8, 1, 1, 1)
    opcheck(operators.norm_silu_after, (frames[:, :2], frames, gamma, None, frames.clone(), True))
    opcheck(operators.add_, (torch.randn(1, 6, 4, 4, 8), gamma.flatten(), frames, 2, 2, 8, False))
    return [f"{name}: {found} of what is allowed" for name, found in errors() if not found <= 1]


def sources() -> Iterator[ASTSource]:
    """Variants of the kernels: whether they add something, of which type, and for how many channels."""
    numbers = {"pixels": "i32", "count": "i32", "scale": "fp32"}
    for dtype, channels, adds in (("*bf16", 1024, True), ("*fp32", 160, False)):
        tensors = dict.fromkeys(("kept", "frames", "gamma", "joined", "kept_after"), dtype)
        added = dict.fromkeys(("bias", "shortcut", "total"), dtype if adds else None)
        yield source(kernels.norm_silu_after_kernel, tensors | added | numbers, tile(channels))
    numbers = {"pixels": "i32", "columns": "i32", "skipped": "i32"}
    for dtype, channels, bias, repetitions in (("*bf16", 1024, "*bf16", (2, 2, 8)), ("*fp32", 160, None, (1, 2, 2))):
        tensors = {"frames": dtype, "bias": bias, "shortcut": dtype}
        factors = dict(zip(("TIMES", "SCALE", "REPEATS"), repetitions, strict=True))
        yield source(kernels.add_kernel, tensors | numbers, tile(channels) | factors)


def source(kernel, types: dict[str, str | None], constants: dict[str, int]) -> ASTSource:
    """Of a kernel that gets arguments of these types, and None where there is no type."""
    fixed = constants | {name: None for name, dtype in types.items() if dtype is None}
    return ASTSource(kernel, types | dict.fromkeys(fixed, "constexpr"), fixed)


def compile_for(capability: int) -> int:
    """The number of variants that the assembler took."""
    target = GPUTarget("cuda", capability, 32)
    return sum(bool(triton.compile(variant, target).asm["cubin"]) for variant in sources())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for capability in map(int, sys.argv[1:]):
            print(capability, compile_for(capability))
    else:
        different = compare()
        print(f"{len(different)} differ", *different, sep="\n")
