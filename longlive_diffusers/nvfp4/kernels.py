"""Triton kernels of NVFP4: what `format.py` says, on a GPU, bit for bit.

Equality is by construction. Every operation is one that IEEE 754 defines to the last bit - products and sums that are
not fused, quotients by `div_rn` - and where the order of a sum matters it is a tree that both sides follow. Rounding
to E4M3, E2M1 and bfloat16 is done on the bits, as Triton's interpreter, in which a CPU tests all this, converts some
numbers wrongly. Noise is hashed from the seed and each element's place (`noise.py`), so no tiling shows in it.

Blackwell converts to and from E2M1 in one instruction each, which `PTX` uses there; elsewhere it is arithmetic.

Nothing here waits for the device: `amax` and the seed are read by the kernels from where they are.
"""

import torch
import triton
import triton.language as tl

from .hadamard import SIGNS
from .noise import FACTORS, SHIFTS
from .rules import ScaleRule


ERRORS = {"mse": 1, "mae": 2, "abs_max": 3}  # of four-over-six; 0: one candidate
_SIGN_BITS = sum(1 << place for place, sign in enumerate(SIGNS) if sign < 0)
_TILE = {False: 1024, True: 128}  # columns of a program's tile, of 1 row or of 16

# As constants, which is what a kernel may use.
_FACTOR_0, _FACTOR_1 = tl.constexpr(FACTORS[0]), tl.constexpr(FACTORS[1])
_SHIFT_0, _SHIFT_1, _SHIFT_2 = (tl.constexpr(shift) for shift in SHIFTS)
_NEGATIVE = tl.constexpr(_SIGN_BITS)
# Of compute capability 10 and up. Two numbers are one byte; the first operand is its upper half.
_TO_E2M1 = tl.constexpr("{.reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, 0f00000000, $1; cvt.u32.u8 $0, pair;}")
_FROM_E2M1 = tl.constexpr("{.reg .b8 pair; cvt.u8.u32 pair, $1; cvt.rn.f16x2.e2m1x2 $0, pair;}")


# ------------------------------------------------------------------------------------------------- pieces of kernels
@triton.jit
def _round_bf16(x):
    """Round float32 to bfloat16's precision, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _bf16_bits(x):
    return (_round_bf16(x).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)


@triton.jit
def _e4m3(x):
    """Bits of the nearest E4M3 number, ties to even, of float32 in [0, 448]; and that number."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
    small = x < 0.015625  # below 2^-6 neighbors are 2^-9 apart; adding 2^23 rounds to whole numbers
    steps = (x * 512.0 + 8388608.0) - 8388608.0
    value = tl.where(small, steps * 0.001953125, rounded.to(tl.float32, bitcast=True))
    code = tl.where(small, steps.to(tl.uint32), (rounded >> 20) - 960)
    return code.to(tl.uint8), value


@triton.jit
def _e4m3_value(code):
    code = code.to(tl.uint32)
    normal = (((code >> 3) + 120) << 23) | ((code & 7) << 20)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal.to(tl.float32, bitcast=True))


@triton.jit
def _e2m1_magnitude(code):
    """Value of codes 0 to 7."""
    exponent, odd = (code >> 1).to(tl.uint32), (code & 1).to(tl.float32)
    power = ((exponent + 126) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 0, odd * 0.5, (1 + odd * 0.5) * power)


@triton.jit
def _e2m1_pairs(packed, PTX: tl.constexpr):
    """Bytes -> float32 with one more dimension, of the two values of each."""
    if PTX:
        halves = tl.inline_asm_elementwise(
            _FROM_E2M1, "=r,r", [packed.to(tl.uint32)], dtype=tl.uint32, is_pure=True, pack=1
        )
        low = (halves & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (halves >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        values = tl.join(low, high)
    else:
        code = tl.join(packed & 15, packed >> 4)
        size = _e2m1_magnitude(code & 7)
        values = tl.where(code >= 8, -size, size)
    return values


@triton.jit
def _e2m1(y, noise, STOCHASTIC: tl.constexpr, PTX: tl.constexpr):
    """Codes 0 to 7 of |y|, saturating; the sign is put in later."""
    size = tl.abs(y)
    if STOCHASTIC:
        steps = tl.where(size < 2, size * 2, tl.where(size < 4, size + 2, size * 0.5 + 4))
        code = tl.minimum(tl.floor(steps + noise), 7.0).to(tl.uint8)
    elif PTX:
        code = tl.inline_asm_elementwise(_TO_E2M1, "=r,f", [size], dtype=tl.uint32, is_pure=True, pack=1)
        code = code.to(tl.uint8)
    else:
        code = (size > 0.25).to(tl.uint8) + (size >= 0.75).to(tl.uint8) + (size > 1.25).to(tl.uint8)
        code += (size >= 1.75).to(tl.uint8) + (size > 2.5).to(tl.uint8) + (size >= 3.5).to(tl.uint8)
        code += (size > 5.0).to(tl.uint8)
    return code


@triton.jit
def _mix(state):
    state = (state ^ (state >> _SHIFT_0)) * _FACTOR_0
    state = (state ^ (state >> _SHIFT_1)) * _FACTOR_1
    return state ^ (state >> _SHIFT_2)


@triton.jit
def _noise(seed_pointer, index):
    """Uniform in [0, 1), of 64-bit indices."""
    first = tl.load(seed_pointer).to(tl.uint32)
    second = tl.load(seed_pointer + 1).to(tl.uint32)
    state = _mix((index & 0xFFFFFFFF).to(tl.uint32) ^ first)
    state = _mix(state + second + (index >> 32).to(tl.uint32))
    return (state >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _hadamard(x, N: tl.constexpr):
    """Of float32 `[N, 16]`: signs, four stages of sums and differences, a quarter, rounding to bfloat16."""
    is_negative = (tl.full((16,), _NEGATIVE, tl.int32) >> tl.arange(0, 16)) & 1
    x = tl.where(is_negative[None, :] == 1, -x, x)
    for _ in tl.static_range(4):
        even, odd = tl.split(tl.reshape(x, (N, 8, 2)))
        # The bit of the index that was last goes first, so that after four stages all are in their places again.
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (N, 16))
    return _round_bf16(x * 0.25)


@triton.jit
def _sum_of_16(x, N: tl.constexpr):
    """`[N, 16]` -> `[N]`, neighbors first."""
    even, odd = tl.split(tl.reshape(x, (N, 8, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (N, 4, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (N, 2, 2)))
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit
def _block_error(errors, ERROR: tl.constexpr, TALL: tl.constexpr, BLOCKS: tl.constexpr):
    """One number for each block: of `[16 * BLOCKS, 16]` (rows, then blocks) or of `[BLOCKS, 16]`."""
    ROWS: tl.constexpr = 16 if TALL else 1
    N: tl.constexpr = ROWS * BLOCKS
    if ERROR == 3:
        found = tl.max(tl.abs(errors), axis=1)
    elif ERROR == 2:
        found = _sum_of_16(tl.abs(errors), N)
    else:
        found = _sum_of_16(errors * errors, N)
    if TALL:
        by_block = tl.trans(tl.reshape(found, (16, BLOCKS)))
        found = tl.max(by_block, axis=1) if ERROR == 3 else _sum_of_16(by_block, BLOCKS)
    return found


@triton.jit
def _spread(per_block, TALL: tl.constexpr, BLOCKS: tl.constexpr):
    """One number for each block -> one for each of its rows, `[16 * BLOCKS]` or `[BLOCKS]`."""
    if TALL:
        per_block = tl.reshape(tl.broadcast_to(per_block[None, :], (16, BLOCKS)), (16 * BLOCKS,))
    return per_block  # the only return: the compiler wants all of them of one shape


@triton.jit
def _candidate(
    x, scale, decode, noise, STOCHASTIC: tl.constexpr, TALL: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr
):
    """Codes (without sign) `[n, 16]`, E4M3 bits and their values, one for each row of `x`."""
    bits, value = _e4m3(tl.minimum(scale, 448.0))
    inverse = tl.where(value == 0, 0.0, tl.div_rn(1.0, tl.where(value == 0, 1.0, decode * value)))
    rows_inverse = _spread(inverse, TALL, BLOCKS)
    return _e2m1(x * rows_inverse[:, None], noise, STOCHASTIC, PTX), bits, value


# ----------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _load_tile(x, rows, columns, row_stride, column_stride, TALL: tl.constexpr, TILE: tl.constexpr):
    """A tile of 1 or 16 rows as float32 `[n, 16]` (rows, then blocks), and the indices of its elements."""
    ROWS: tl.constexpr = 16 if TALL else 1
    N: tl.constexpr = ROWS * TILE // 16
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * row_stride + column[None, :] * column_stride
    tile = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    index = row[:, None] * columns + column[None, :]
    return tl.reshape(tile, (N, 16)), tl.reshape(index, (N, 16))


@triton.jit
def _quantize_kernel(
    x, amax_pointer, seed, codes, scales, rows, columns, row_stride, column_stride, rows_of_an_amax,
    LARGEST_VALUE: tl.constexpr, SPAN: tl.constexpr, ERROR: tl.constexpr,
    HADAMARD: tl.constexpr, STOCHASTIC: tl.constexpr, TALL: tl.constexpr, TILE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = 16 if TALL else 1
    BLOCKS: tl.constexpr = TILE // 16
    N: tl.constexpr = ROWS * BLOCKS
    tile, index = _load_tile(x, rows, columns, row_stride, column_stride, TALL, TILE)
    if HADAMARD:
        tile = _hadamard(tile, N)
    noise = tile
    if STOCHASTIC:
        noise = _noise(seed, index)

    amax = tl.load(amax_pointer + tl.program_id(0).to(tl.int64) * ROWS // rows_of_an_amax)
    is_zero = amax < 1e-35
    encode = tl.where(is_zero, 0.0, tl.div_rn(SPAN + tl.zeros_like(amax), tl.where(is_zero, 1.0, amax)))
    decode = tl.where(is_zero, 0.0, tl.div_rn(1.0 + tl.zeros_like(amax), tl.where(is_zero, 1.0, encode)))
    peak = tl.max(tl.abs(tile), axis=1)
    if TALL:
        peak = tl.max(tl.reshape(peak, (16, BLOCKS)), axis=0)
    scale = tl.div_rn(peak, LARGEST_VALUE + tl.zeros_like(peak)) * encode

    code, bits, value = _candidate(tile, scale, decode, noise, STOCHASTIC, TALL, BLOCKS, PTX)
    if ERROR > 0:
        other_code, other_bits, other_value = _candidate(
            tile, scale * 1.5, decode, noise, STOCHASTIC, TALL, BLOCKS, PTX
        )
        errors = _error(tile, code, value, amax, SPAN, ERROR, TALL, BLOCKS)
        other_errors = _error(tile, other_code, other_value, amax, SPAN, ERROR, TALL, BLOCKS)
        prefers_four = other_errors < errors  # a tie goes to six
        bits = tl.where(prefers_four, other_bits, bits)
        rows_prefer_four = _spread(prefers_four.to(tl.int8), TALL, BLOCKS)
        code = tl.where((rows_prefer_four == 1)[:, None], other_code, code)

    # The sign of x, of a zero too; where the scale is 0, so is the product, with the same sign.
    negative = (tile.to(tl.uint32, bitcast=True) >> 31).to(tl.uint8)
    low, high = tl.split(tl.reshape(code | (negative << 3), (ROWS, TILE // 2, 2)))
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1).to(tl.int64) * (TILE // 2) + tl.arange(0, TILE // 2)
    inside = (row < rows)[:, None] & (pair < columns // 2)[None, :]
    tl.store(codes + row[:, None] * (columns // 2) + pair[None, :], low | (high << 4), mask=inside)
    block = tl.program_id(1).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (row < rows)[:, None] & (block < columns // 16)[None, :]
    tile_bits = tl.reshape(_spread(bits, TALL, BLOCKS), (ROWS, BLOCKS))
    tl.store(scales + row[:, None] * (columns // 16) + block[None, :], tile_bits, mask=inside)


@triton.jit
def _error(x, code, value, amax, SPAN: tl.constexpr, ERROR: tl.constexpr, TALL: tl.constexpr, BLOCKS: tl.constexpr):
    size = _e2m1_magnitude(code)
    signed = tl.where((x.to(tl.uint32, bitcast=True) >> 31) == 1, -size, size)
    decoded = signed * _spread(value, TALL, BLOCKS)[:, None] * amax
    decoded = tl.div_rn(decoded, SPAN + tl.zeros_like(decoded))
    return _block_error(decoded - x, ERROR, TALL, BLOCKS)


@triton.jit
def _dequantize_kernel(
    codes, scales, amax_pointer, out, num_blocks,
    SPAN: tl.constexpr, BF16: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    place = tl.arange(0, 8)
    packed = tl.load(codes + block[:, None] * 8 + place[None, :], mask=inside[:, None], other=0)
    value = tl.reshape(_e2m1_pairs(packed, PTX), (BLOCKS, 16))
    scale = _e4m3_value(tl.load(scales + block, mask=inside, other=0))
    number = tl.div_rn(value * scale[:, None] * tl.load(amax_pointer), SPAN + tl.zeros_like(value))
    target = out + block[:, None] * 16 + tl.arange(0, 16)[None, :]
    if BF16:
        tl.store(target, _bf16_bits(number), mask=inside[:, None])
    else:
        tl.store(target, number, mask=inside[:, None])


@triton.jit
def _read_frames_kernel(
    codes, scales, amax_pointer, mean, target, length, slots, tokens,
    SPAN: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, HAS_MEAN: tl.constexpr, BF16: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0) // length * slots + tl.program_id(0) % length
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    row = frame.to(tl.int64) * tokens + token
    packed = tl.load(codes + row[:, None] * (DIM // 2) + tl.arange(0, DIM // 2)[None, :], mask=inside, other=0)
    value = tl.reshape(_e2m1_pairs(packed, PTX), (TOKENS * DIM // 16, 16))
    bits = tl.load(scales + row[:, None] * (DIM // 16) + tl.arange(0, DIM // 16)[None, :], mask=inside, other=0)
    amax = tl.load(amax_pointer + frame)
    scale = _e4m3_value(tl.reshape(bits, (TOKENS * DIM // 16,))) * tl.div_rn(amax, SPAN + tl.zeros_like(amax))
    number = tl.reshape(value * scale[:, None], (TOKENS, DIM))
    if HAS_MEAN:
        number += tl.load(mean + frame * DIM + tl.arange(0, DIM))[None, :]
    place = target + row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    if BF16:
        tl.store(place, _bf16_bits(number), mask=inside)
    else:
        tl.store(place, number, mask=inside)


# ---------------------------------------------------------------------------------------------------------- launches
def has_fp4_instructions(device: torch.device) -> bool:
    """Whether the device converts to and from E2M1 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def quantize_matrix(
    x: torch.Tensor,
    amax: torch.Tensor,
    rule: ScaleRule,
    block: tuple[int, int],
    seed: torch.Tensor | None,
    hadamard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        x: float32, bfloat16 or float16 `[rows, cols]`, of any strides: a transposed view costs no copy.
        amax: float32 `[1]`, or `[n]` where each nth of the rows has its own (1x16 blocks only); with `hadamard`, after
            the transform.
        rule, block: As in `format.quantize`.
        seed: Of stochastic rounding, int64 `[2]`; None: round to nearest.
        hadamard: Transform each 16 columns first.

    Returns:
        Codes `[rows, cols / 2]` and scales `[rows, cols / 16]` (float8_e4m3fn).
    """
    rows, columns = x.shape
    tall = block[0] > 1
    tile = _TILE[tall]
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, columns // 16, dtype=torch.uint8, device=x.device)
    grid = (triton.cdiv(rows, 16 if tall else 1), triton.cdiv(columns, tile))
    _quantize_kernel[grid](
        x, amax, amax if seed is None else seed, codes, scales, rows, columns, *x.stride(), rows // amax.numel(),
        LARGEST_VALUE=rule.largest_value, SPAN=rule.span, ERROR=0 if rule.error is None else ERRORS[rule.name],
        HADAMARD=hadamard, STOCHASTIC=seed is not None, TALL=tall, TILE=tile,
        PTX=has_fp4_instructions(x.device),
        # A product and a sum are two roundings, as in the reference.
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales.view(torch.float8_e4m3fn)


def dequantize_matrix(
    codes: torch.Tensor, scales: torch.Tensor, amax: torch.Tensor, rule: ScaleRule, dtype: torch.dtype
) -> torch.Tensor:
    """`[rows, cols]` in float32 or bfloat16."""
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    num_blocks = rows * columns // 16
    is_bf16 = dtype == torch.bfloat16
    _dequantize_kernel[(triton.cdiv(num_blocks, 64),)](
        codes.contiguous(), scales.contiguous().view(torch.uint8), amax, out.view(torch.uint16) if is_bf16 else out,
        num_blocks, SPAN=rule.span, BF16=is_bf16, BLOCKS=64, PTX=has_fp4_instructions(codes.device),
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def read_frames(
    codes: torch.Tensor,
    scales: torch.Tensor,
    amax: torch.Tensor,
    mean: torch.Tensor | None,
    rule: ScaleRule,
    target: torch.Tensor,
    length: int,
) -> None:
    """
    The first `length` slots of a cache, in one launch, into those of `target`.

    Args:
        codes, scales: uint8 `[B, heads, slots, tokens, head_dim / 2]` and `[..., head_dim / 16]`; head_dim a power of
            two.
        amax, mean: float32 `[B, heads, slots, 1, 1]` and `[B, heads, slots, 1, head_dim]` or None.
        target: float32 or bfloat16 `[B, heads, slots, tokens, head_dim]`; all contiguous.
    """
    batch, heads, slots, tokens, head_dim = target.shape
    is_bf16 = target.dtype == torch.bfloat16
    _read_frames_kernel[(batch * heads * length, triton.cdiv(tokens, 16))](
        codes, scales, amax, amax if mean is None else mean, target.view(torch.uint16) if is_bf16 else target,
        length, slots, tokens, SPAN=rule.span, DIM=head_dim, TOKENS=16, HAS_MEAN=mean is not None, BF16=is_bf16,
        PTX=has_fp4_instructions(codes.device), enable_fp_fusion=False,
    )  # fmt: skip
