"""The Triton kernel of the VAE's decoder. Compare it with plain PyTorch, by itself and in a stream of chunks:

    TRITON_INTERPRET=1 python -m tests.programs.wan_decoder_kernel

or compile it for GPUs that need not be there: python -m tests.programs.wan_decoder_kernel 90 100
"""

import itertools
import sys
from unittest import mock

import torch
import triton
from torch.library import opcheck
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longlive_diffusers import StreamingDecoder, triton_launch
from longlive_diffusers.models.wan_decoder import kernels, norm_silu, operators
from tests.support.tiny_vae import tiny_vae, wan_2_1_vae


SHAPES = [(1, 1, 2, 3, 8), (2, 3, 5, 7, 12), (1, 4, 3, 3, 96), (1, 2, 1, 1, 1024), (2, 1, 3, 2, 160)]
# Triton's interpreter does not always round to the nearest number of 16 bits, but to one beside it.
STEPS = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def largest_error(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Of both results, in units of the dtype's steps; that of earlier frames is infinite unless they are the same."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(shape[0], 2, *shape[2:], generator=generator).to(dtype)
    frames = (3 * torch.randn(shape, generator=generator)).to(dtype)
    frames[0, 0, 0, 0] = 0
    frames[0, -1, -1, -1, -1] = torch.nan
    gamma = torch.randn(shape[-1], 1, 1, 1, generator=generator).to(dtype)
    found = operators.norm_silu_after(kept, frames, gamma)
    expected = norm_silu.norm_silu_after(kept, frames, gamma)
    joined, kept_after = (result.nan_to_num() for result in found)
    if not torch.equal(joined[:, :2], kept) or not torch.equal(kept_after, joined[:, -2:]):
        return torch.inf
    errors = []
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()):
            return torch.inf
        error = (one.double() - other.double()).abs() / (STEPS[dtype] * other.double().abs().clamp_min(2**-6))
        errors.append(error.nan_to_num(0).max().item())
    return max(errors)


def error_of_a_stream(make_vae, batch: int) -> float:
    """Of pixels in float32, between a decoder that runs the kernel and one that does not."""
    vae, pixels = make_vae(), []
    latents = torch.randn(batch, 8, 4, 1, 2, generator=torch.Generator().manual_seed(0))
    for runs_kernels in (True, False):
        with mock.patch.object(triton_launch, "is_for_kernels", lambda device, answer=runs_kernels: answer):
            decoder = StreamingDecoder(vae)
            pixels.append(torch.cat([decoder.decode(chunk) for chunk in latents.split([1, 1, 2], dim=2)], dim=2))
    return (pixels[0] - pixels[1]).abs().max().item()


def compare() -> list[str]:
    """What differs by more than it may."""
    found = {f"{shape} {dtype}": largest_error(shape, dtype) for shape, dtype in itertools.product(SHAPES, STEPS)}
    for make_vae, batch in ((tiny_vae, 1), (wan_2_1_vae, 2)):
        found[f"stream of {make_vae.__name__}"] = error_of_a_stream(make_vae, batch) / 1e-5
    opcheck(
        operators.norm_silu_after, (torch.randn(1, 2, 2, 2, 8), torch.randn(1, 3, 2, 2, 8), torch.ones(8, 1, 1, 1))
    )
    return [f"{name}: {error} of what is allowed" for name, error in found.items() if not error <= 1]


def compile_for(capability: int) -> int:
    """The number of variants that the assembler took."""
    compiled = 0
    for dtype, channels in itertools.product(("*bf16", "*fp32"), (160, 1024)):
        wide = 1 << (channels - 1).bit_length()
        constants = {"CHANNELS": channels, "WIDE": wide, "PIXELS": max(1, operators.TILE // wide)}
        types = dict.fromkeys(("kept", "frames", "gamma", "joined", "kept_after"), dtype)
        types |= {"pixels": "i32", "count": "i32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernels.norm_silu_after_kernel, types, constants)
        compiled += bool(triton.compile(source, GPUTarget("cuda", capability, 32)).asm["cubin"])
    return compiled


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for capability in map(int, sys.argv[1:]):
            print(capability, compile_for(capability))
    else:
        different = compare()
        print(f"{len(different)} differ", *different, sep="\n")
