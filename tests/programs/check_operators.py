"""Checks that the Triton kernels' operators are what torch takes them for:
TRITON_INTERPRET=1 python -m tests.programs.check_operators
"""

import torch
from torch.library import opcheck

from longlive_diffusers.fp8.operators import quantize_rows
from longlive_diffusers.fused import operators as fused_operators
from longlive_diffusers.models.sparse_attention import take_blocks_of_both
from longlive_diffusers.nvfp4 import operators


# All but that inputs stay as they are, which torch cannot compare in E4M3.
WITHOUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check() -> None:
    """Raise an OpCheckError if an operator changes what it does not name, returns views of its inputs, or returns
    another shape, dtype or device than it tells `torch.compile`."""
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    transposed = x[:, :2].T  # two rows, since each is a program of the interpreter
    amax, seed = x.abs().amax().reshape(1), torch.tensor([1, 2])
    opcheck(operators.quantize_matrix, (transposed, amax, "static_6", (1, 16), seed, True))
    opcheck(operators.hadamard_amax, (transposed,))
    opcheck(quantize_rows.registered, (transposed,))
    quantized = operators.quantize_matrix(x[:2], amax, "mse", (1, 16), None)
    opcheck(operators.dequantize_matrix, (*quantized, amax, "mse", torch.bfloat16), test_utils=WITHOUT_SCHEMA)
    frames = (1, 2, 3)
    codes = torch.full((*frames, 4, 8), 0x72, dtype=torch.uint8)
    scales, amax = torch.full((*frames, 4, 1), 0x30, dtype=torch.uint8), torch.ones(*frames, 1, 1)
    target, slots = torch.zeros(*frames, 4, 16), torch.tensor([[1]])
    mean = torch.ones(*frames, 1, 16)
    opcheck(operators.read_nvfp4_frames, (codes, scales, amax, None, "mse", target[:, :, :2]))
    opcheck(operators.write_nvfp4_frames, (target[:, :, :2], slots, codes, scales, amax, mean, "mse"))
    opcheck(operators.read_fp8_frames, (codes, amax, torch.zeros(*frames, 4, 8)[:, :, :2]))
    opcheck(operators.write_fp8_frames, (torch.zeros(*frames, 4, 8)[:, :, :2], slots, codes, amax))
    key, chosen = torch.randn(1, 2, 6, 4).transpose(1, 2), torch.tensor([[[[0], [2]]]])
    opcheck(take_blocks_of_both, (key, key.clone(), chosen, 2))
    check_fused()


def check_fused() -> None:
    """The operators of `fused`: two videos of two frames, with three tokens of two heads of four channels."""
    tokens, by_frame, row = torch.randn(2, 6, 8), torch.randn(2, 2, 1, 8), torch.randn(8)
    opcheck(fused_operators.norm_rows.registered, (tokens, by_frame, by_frame, 1e-6))
    opcheck(fused_operators.add_and_norm_rows.registered, (tokens, tokens.bfloat16(), by_frame, row, row, 1e-6))
    opcheck(fused_operators.norm_rows_in_fp8.registered, (tokens, by_frame, by_frame, 1e-6))
    opcheck(fused_operators.add_and_norm_rows_in_fp8.registered, (tokens, tokens.bfloat16(), by_frame, row, row, 1e-6))
    opcheck(fused_operators.gelu_rows_in_fp8.registered, (tokens[0, :2],))
    opcheck(fused_operators.add_rows.registered, (tokens, tokens, by_frame, torch.bfloat16))
    cache, raw, rotary = torch.zeros(2, 2, 12, 4), torch.zeros(2, 2, 3, 3, 4), torch.randn(1, 6, 1, 2, 2)
    slots = torch.arange(6).expand(2, 6)
    projected = (tokens, tokens.clone(), tokens.clone(), row, row, 1e-6, rotary, cache, cache.clone(), slots)
    for keeps_raw in ((None, None), (raw, torch.tensor([[0, 2], [1, 2]]))):
        opcheck(fused_operators.norm_rotate_and_write.registered, (*projected, *keeps_raw))


if __name__ == "__main__":
    check()
