"""Checks that the Triton kernels' operators are what torch takes them for:
TRITON_INTERPRET=1 python -m tests.programs.check_operators
"""

import torch
from torch.library import opcheck

from longlive_diffusers.nvfp4 import operators


# All but that inputs stay as they are, which torch cannot compare in E4M3.
WITHOUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check() -> None:
    """Raise an OpCheckError if an operator changes what it does not name, returns views of its inputs, or returns
    another shape, dtype or device than it tells `torch.compile`."""
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    amax, seed = x.abs().amax().reshape(1), torch.tensor([1, 2])
    opcheck(operators.quantize_matrix, (x, amax, "mse", (16, 16), None))
    opcheck(operators.quantize_matrix, (x.T, amax, "static_6", (1, 16), seed, True))
    opcheck(operators.hadamard_amax, (x.T,))
    opcheck(operators.quantize_rows, (x.T,))
    quantized = operators.quantize_matrix(x, amax, "mse", (1, 16), None)
    opcheck(operators.dequantize_matrix, (*quantized, amax, "mse", torch.bfloat16), test_utils=WITHOUT_SCHEMA)
    frames = (1, 2, 3)
    codes = torch.full((*frames, 4, 8), 0x72, dtype=torch.uint8)
    scales, amax = torch.full((*frames, 4, 1), 0x30, dtype=torch.uint8), torch.ones(*frames, 1, 1)
    target = torch.zeros(*frames, 4, 16)
    for mean in (None, torch.ones(*frames, 1, 16)):
        opcheck(operators.read_nvfp4_frames, (codes, scales, amax, mean, "mse", target[:, :, :2]))
    opcheck(operators.read_fp8_frames, (codes, amax, torch.zeros(*frames, 4, 8)[:, :, :2]))


if __name__ == "__main__":
    check()
