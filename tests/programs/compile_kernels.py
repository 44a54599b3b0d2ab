"""Compiles the Triton kernels for GPUs that need not be there:
python -m tests.programs.compile_kernels 90 100 120 80

Prints, for each compute capability, how many variants the assembler took, and how many use the instructions that
convert to and from E2M1, and to E4M3. A variant that was compiled for an earlier one is compiled again only where it
uses such instructions, which the assembler of this one may not know, and it is the kernel's first.
"""

import sys
from collections import Counter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longlive_diffusers.fp8 import kernels as fp8_kernels
from longlive_diffusers.fused import kernels as fused_kernels
from longlive_diffusers.models.block_kernels import take_blocks_kernel
from longlive_diffusers.nvfp4 import kernels


MATRIX = {"rows": "i32", "columns": "i32", "row_stride": "i64", "column_stride": "i64"}
QUANTIZE = (
    {"amax_pointer": "*fp32", "seed": "*i64", "codes": "*u8", "scales": "*u8"} | MATRIX | {"rows_of_an_amax": "i32"}
)
PACKED = {"codes": "*u8", "scales": "*u8", "amax_pointer": "*fp32"}


def variants(capability: int):
    """Kernel, types of its arguments in order, and its constants."""
    ptx, to_e4m3 = capability >= 100, capability >= 89
    wide, tall = {"TALL": False, "TILE": 1024}, {"TALL": True, "TILE": 128}
    rules = ((False, 0, "*fp16", wide), (False, 1, "*bf16", wide), (True, 3, "*fp32", wide), (True, 3, "*fp32", tall))
    for stochastic, error, dtype, shape in rules:
        rule = {"LARGEST_VALUE": 6.0, "SPAN": 2688.0, "ERROR": error}
        how = {"HADAMARD": stochastic and not shape["TALL"], "STOCHASTIC": stochastic, "PTX": ptx}
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
        yield fp8_kernels.quantize_rows_kernel, rows, {"BLOCK": 4096, "PTX": to_e4m3}
    yield from variants_that_write_frames(ptx)
    yield from fused_variants("*bf16", to_e4m3)


def variants_that_write_frames(ptx: bool):
    """The kernels that write to the KV cache."""
    window, float32 = {"window": "*bf16", "chosen": "*i64"}, {"mean": "*fp32", "amax": "*fp32"}
    place = {"head_stride": "i64"} | dict.fromkeys(("heads", "frames", "slots"), "i32")
    yield kernels.center_frames_kernel, window | float32 | place | {"tokens": "i32"}, {"DIM": 128, "TOKENS": 32}
    amax = window | {"amax": "*fp32"} | place | {"size": "i32"}
    yield kernels.frame_amax_kernel, amax, {"DIVISOR": 448.0, "TILE": 8192}
    frames = window | {"codes": "*u8", "scales": "*fp32"} | place | {"size": "i32"}
    yield kernels.write_fp8_frames_kernel, frames, {"TILE": 4096}
    frames = window | {"codes": "*u8", "scales": "*u8", "amax": "*fp32", "mean": "*fp32"} | place | {"size": "i32"}
    rule = {"LARGEST_VALUE": 6.0, "SPAN": 1536.0, "DIM": 128, "BLOCKS": 128, "PTX": ptx}
    yield kernels.write_nvfp4_frames_kernel, frames, rule | {"ERROR": 1, "HAS_MEAN": True}
    yield kernels.write_nvfp4_frames_kernel, frames | {"window": "*fp32"}, rule | {"ERROR": 0, "HAS_MEAN": False}


def fused_variants(bits: str, to_e4m3: bool):
    """The kernels of `fused`, and of sparse attention, for a network of width 3072 in `bits`."""
    tensors = dict.fromkeys(("hidden_states",), "*fp32") | {"update": bits} | dict.fromkeys(("gate",), "*fp32")
    tensors |= {"weight": "*fp32", "bias": "*fp32", "added": "*fp32", "normed": bits, "scales": "*fp32"}
    sizes = dict.fromkeys(("rows", "rows_of_a_frame", "dim"), "i32")
    strides = [f"{name}_{kind}stride" for name in ("gate", "weight", "bias") for kind in ("batch_", "")]
    arguments = tensors | sizes | dict.fromkeys(strides, "i64") | {"eps": "fp32"}
    for adds, gated, norms in ((False, False, True), (True, False, True), (True, True, True), (True, True, False)):
        constants = {"BLOCK": 4096, "ADDS": adds, "GATED": gated, "NORMS": norms, "PTX": to_e4m3}
        yield fused_kernels.add_and_norm_kernel, arguments, constants | {"QUANTIZES": False}
        if norms:
            yield fused_kernels.add_and_norm_kernel, arguments | {"normed": "*u8"}, constants | {"QUANTIZES": True}
    rows = {"x": bits, "codes": "*u8", "scales": "*fp32", "columns": "i32"}
    yield fused_kernels.gelu_in_fp8_kernel, rows, {"BLOCK": 16384, "PTX": to_e4m3, "num_warps": 16}
    tensors = dict.fromkeys(("query", "key", "value", "query_weight", "key_weight"), bits)
    tensors |= {"rotary": "*fp32", "rotated": bits, "key_cache": bits, "value_cache": bits, "token_slots": "*i64"}
    tensors |= {"raw_key_cache": bits, "raw_slots": "*i64"}
    tensors |= dict.fromkeys(("query_factor", "key_factor", "value_factor"), "*fp32")
    strides = ["query_stride", "key_stride", "value_stride", "rotary_batch_stride"]
    strides += [f"{name}_{axis}_stride" for name in ("key", "value") for axis in ("batch", "head", "slot")]
    strides += [f"raw_{axis}_stride" for axis in ("batch", "head", "frame", "token")]
    sizes = dict.fromkeys(("tokens", "dim"), "i32")
    arguments = tensors | sizes | dict.fromkeys(strides, "i64") | {"num_frames": "i32", "eps": "fp32"}
    for keeps_raw, codes in ((False, False), (True, False), (True, True)):
        written = dict.fromkeys(("rotated", "key_cache", "value_cache"), "*i16" if codes else bits)
        constants = {"BLOCK": 4096, "HEAD_DIM": 128, "KEEPS_RAW": keeps_raw, "CODES": codes, "PTX": to_e4m3}
        yield fused_kernels.norm_rotate_and_write_kernel, arguments | written, constants
    codes = {"codes": "*u8", "scale": "*fp32", "result": bits} | dict.fromkeys(("tokens", "dim", "head_dim"), "i32")
    yield fused_kernels.decode_heads_kernel, codes, {"BLOCK": 4096}
    tensors = {"key": bits, "value": bits, "chosen": "*i64", "taken_key": bits, "taken_value": bits}
    strides = [f"{name}_{axis}_stride" for name in ("key", "value") for axis in ("batch", "head")]
    arguments = tensors | dict.fromkeys(strides, "i64") | dict.fromkeys(("strips", "heads", "count", "size"), "i32")
    yield take_blocks_kernel, arguments, {"TILE": 4096}


def compile_for(capability: int, seen: set[str]) -> tuple[int, int, int]:
    """Variants compiled, and those whose assembly has an instruction of E2M1, and of E4M3."""
    compiled, with_instruction = Counter(), Counter()
    for kernel, types, constants in variants(capability):
        variant = str((kernel.__name__, types, constants))
        if variant in seen and (compiled[kernel] or not constants.get("PTX")):
            continue
        seen.add(variant)
        options = {"enable_fp_fusion": False, "num_warps": constants.pop("num_warps", 4)}
        source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
        made = triton.compile(source, GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
        compiled[kernel] += 1
        with_instruction.update(kind for kind in ("e2m1x2", "e4m3x2") if kind in made.asm["ptx"])
    return compiled.total(), with_instruction["e2m1x2"], with_instruction["e4m3x2"]


if __name__ == "__main__":
    seen: set[str] = set()
    for capability in map(int, sys.argv[1:]):
        print(capability, *compile_for(capability, seen))
