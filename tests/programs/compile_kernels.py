"""Compiles the Triton kernels for GPUs that need not be there: python -m tests.programs.compile_kernels 90 100

Prints, for each compute capability, how many variants the assembler took, and how many use E2M1's instructions.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longlive_diffusers.nvfp4 import kernels


MATRIX = {"rows": "i32", "columns": "i32", "row_stride": "i64", "column_stride": "i64"}
QUANTIZE = (
    {"amax_pointer": "*fp32", "seed": "*i64", "codes": "*u8", "scales": "*u8"} | MATRIX | {"rows_of_an_amax": "i32"}
)
PACKED = {"codes": "*u8", "scales": "*u8", "amax_pointer": "*fp32"}


def variants(ptx: bool):
    """Kernel, types of its arguments in order, and its constants."""
    for tall, tile in ((False, 1024), (True, 128)):
        shape = {"TALL": tall, "TILE": tile}
        for stochastic, error, dtype in ((False, 1, "*bf16"), (True, 3, "*fp32"), (False, 0, "*fp16")):
            rule = {"LARGEST_VALUE": 6.0, "SPAN": 2688.0, "ERROR": error}
            how = {"HADAMARD": stochastic and not tall, "STOCHASTIC": stochastic, "PTX": ptx}
            yield kernels.quantize_kernel, {"x": dtype, **QUANTIZE}, rule | how | shape
    for is_bf16 in (False, True):
        out, common = "*u16" if is_bf16 else "*fp32", {"SPAN": 2688.0, "BF16": is_bf16, "PTX": ptx}
        yield kernels.dequantize_kernel, {**PACKED, "out": out, "num_blocks": "i64"}, common | {"BLOCKS": 64}
        place = {"target": out, "head_stride": "i64", "length": "i32", "slots": "i32"}
        frames = {**PACKED, "mean": "*fp32"} | place | {"tokens": "i32"}
        yield kernels.read_nvfp4_frames_kernel, frames, common | {"DIM": 128, "TOKENS": 16, "HAS_MEAN": is_bf16}
        frames = {"codes": "*u8", "scales": "*fp32"} | place | {"size": "i32"}
        yield kernels.read_fp8_frames_kernel, frames, {"TILE": 4096, "BF16": is_bf16}
    for dtype in ("*bf16", "*fp32"):
        strides = {"row_stride": "i64", "column_stride": "i64"}
        yield kernels.hadamard_amax_kernel, {"x": dtype, "amax": "*fp32"} | MATRIX, {"TILE": 1024}
        rows = {"x": dtype, "codes": "*u8", "scales": "*fp32", "columns": "i32"} | strides
        yield kernels.quantize_rows_kernel, rows, {"TILE": 4096}


def compile_for(capability: int) -> tuple[int, int]:
    """Variants compiled, and those whose assembly has an instruction of E2M1."""
    total = with_instruction = 0
    for kernel, types, constants in variants(ptx=capability >= 100):
        source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
        made = triton.compile(source, GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
        assert made.asm["cubin"]
        total += 1
        with_instruction += "e2m1x2" in made.asm["ptx"]
    return total, with_instruction


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        print(capability, *compile_for(capability))
