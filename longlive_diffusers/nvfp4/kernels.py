"""Triton kernels: what `format.py` and the stores of the KV cache specify, on a GPU, bit for bit. `operators.py`
launches them.

Equality is by construction, for tensors whose largest number is between 1e-31 and 1e35, so that nothing under- or
overflows. Every operation is one that IEEE 754 defines to the last bit - products and sums that are not fused,
quotients by `div_rn` - and where the order of a sum matters it is a tree that both sides follow. (The mean of cached
keys is the only exception.) Rounding to E4M3, E2M1 and bfloat16 is done on the bits or by sums, because Triton's
interpreter, with which all this is tested on a CPU, converts some numbers wrongly. Noise is hashed from the seed and
each element's index (`noise.py`), so it does not depend on the tiling.

Blackwell converts to and from E2M1 in one instruction each, which the kernels use if `PTX` is set; elsewhere the
conversion is arithmetic.

Nothing here waits for the device: the kernels read `amax` and the seed from device memory.
"""

import triton
import triton.language as tl

from ..fp8.kernels import e4m3_magnitude, e4m3_number, e4m3_quotient_bits, e4m3_value, magnitude_bits
from .hadamard import NEGATIVE
from .noise import FACTORS, SHIFTS


# A kernel may use globals only as constants.
_FACTOR_0, _FACTOR_1 = tl.constexpr(FACTORS[0]), tl.constexpr(FACTORS[1])
_SHIFT_0, _SHIFT_1, _SHIFT_2 = (tl.constexpr(shift) for shift in SHIFTS)
_NEGATIVE = tl.constexpr(NEGATIVE)
# For compute capability 10 and up. Two numbers share a byte; the first operand becomes its upper half.
_TO_E2M1 = tl.constexpr("{.reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, 0f00000000, $1; cvt.u32.u8 $0, pair;}")
_FROM_E2M1 = tl.constexpr("{.reg .b8 pair; cvt.u8.u32 pair, $1; cvt.rn.f16x2.e2m1x2 $0, pair;}")


# ------------------------------------------------------------------------------------------------- pieces of kernels
@triton.jit
def _round_bf16(x):
    """Round float32 to bfloat16's precision, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)  # NaN of a GPU would overflow to 0


@triton.jit
def _bf16_bits(x):
    return (_round_bf16(x).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)


@triton.jit
def _e2m1_magnitude(code):
    """Return the values of codes 0 to 7."""
    exponent, odd = (code >> 1).to(tl.uint32), (code & 1).to(tl.float32)
    power = ((exponent + 126) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 0, odd * 0.5, (1 + odd * 0.5) * power)


@triton.jit
def _e2m1_pairs(packed, PTX: tl.constexpr):
    """Bytes -> the two values of each, float32, along a new last dimension."""
    if PTX:
        halves = tl.inline_asm_elementwise(
            _FROM_E2M1, "=r,r", [packed.to(tl.uint32)], dtype=tl.uint32, is_pure=True, pack=1
        )
        low = (halves & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (halves >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        values = tl.join(low, high)
    else:
        code = tl.join(packed & 15, packed >> 4)
        magnitude = _e2m1_magnitude(code & 7)
        values = tl.where(code >= 8, -magnitude, magnitude)
    return values


@triton.jit
def _to_e2m1(y, noise, STOCHASTIC: tl.constexpr, PTX: tl.constexpr):
    """Round |y| to the magnitude of an E2M1 number, saturating; float32."""
    magnitude = tl.abs(y)
    if STOCHASTIC:
        steps = tl.where(magnitude < 2, magnitude * 2, tl.where(magnitude < 4, magnitude + 2, magnitude * 0.5 + 4))
        value = _e2m1_magnitude(tl.minimum(tl.floor(steps + noise), 7.0).to(tl.uint8))
    elif PTX:
        code = tl.inline_asm_elementwise(_TO_E2M1, "=r,f", [magnitude], dtype=tl.uint32, is_pure=True, pack=1)
        value = _e2m1_magnitude(code.to(tl.uint8))
    else:
        # From a power of two to the next, neighbors are half of it apart; below 1, 0.5. In float32, those from 2^22
        # times the power on are just as far apart, so that adding it rounds, ties to even.
        magnitude = tl.minimum(magnitude, 6.0, propagate_nan=tl.PropagateNan.ALL)
        power = tl.maximum(magnitude.to(tl.uint32, bitcast=True) & 0x7F800000, 0x3F800000)
        large = (power + 0x0B000000).to(tl.float32, bitcast=True)
        value = (magnitude + large) - large
    return value


@triton.jit
def _e2m1_code(magnitude):
    """Return codes 0 to 7, uint32: from 1 on, the last bits of the exponent and the first of the mantissa, but for an
    offset."""
    code = (magnitude.to(tl.uint32, bitcast=True) >> 22) - 252
    return tl.where(magnitude >= 1, code, (magnitude == 0.5).to(tl.uint32))


@triton.jit
def _mix(state):
    state = (state ^ (state >> _SHIFT_0)) * _FACTOR_0
    state = (state ^ (state >> _SHIFT_1)) * _FACTOR_1
    return state ^ (state >> _SHIFT_2)


@triton.jit
def _noise(seed_pointer, index):
    """Return uniform noise in [0, 1) for elements of 64-bit indices."""
    first = tl.load(seed_pointer).to(tl.uint32)
    second = tl.load(seed_pointer + 1).to(tl.uint32)
    state = _mix((index & 0xFFFFFFFF).to(tl.uint32) ^ first)
    state = _mix(state + second + (index >> 32).to(tl.uint32))
    return (state >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _hadamard(x, N: tl.constexpr):
    """Transform float32 `[N, 16]`: signs, four stages of sums and differences, a quarter, rounding to bfloat16."""
    is_negative = (tl.full((16,), _NEGATIVE, tl.int32) >> tl.arange(0, 16)) & 1
    x = tl.where(is_negative[None, :] == 1, -x, x)
    for _ in tl.static_range(4):
        even, odd = tl.split(tl.reshape(x, (N, 8, 2)))
        # The last bit of the index becomes the first, so that after four stages all elements are in order again.
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (N, 16))
    return _round_bf16(x * 0.25)


@triton.jit
def _sum_of_16(x, N: tl.constexpr):
    """Sum `[N, 16]` to `[N]`, neighbors first."""
    even, odd = tl.split(tl.reshape(x, (N, 8, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (N, 4, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (N, 2, 2)))
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit
def _block_error(errors, ERROR: tl.constexpr, TALL: tl.constexpr, BLOCKS: tl.constexpr):
    """Reduce errors `[16 * BLOCKS, 16]` (rows, then blocks) or `[BLOCKS, 16]` to one number for each block."""
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
    return per_block  # the only return, as the compiler wants all returns to have one shape


@triton.jit
def _candidate(
    x, scale, decode, noise, STOCHASTIC: tl.constexpr, TALL: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr
):
    """Return magnitudes of E2M1 `[n, 16]`, and E4M3 bits and their values, one for each block."""
    bits, value = e4m3_magnitude(tl.minimum(scale, 448.0))
    inverse = tl.where(value == 0, 0.0, tl.div_rn(1.0, tl.where(value == 0, 1.0, decode * value)))
    rows_inverse = _spread(inverse, TALL, BLOCKS)
    return _to_e2m1(x * rows_inverse[:, None], noise, STOCHASTIC, PTX), bits, value


@triton.jit
def _decoded(magnitude, value, amax, SPAN: tl.constexpr, TALL: tl.constexpr, BLOCKS: tl.constexpr):
    """Return magnitude * value * amax / SPAN. A magnitude is 1 or 1.5 times a power of two, which changes nothing
    about how numbers are rounded that neither under- nor overflow: a block takes two quotients, not sixteen."""
    span = SPAN + tl.zeros_like(value)
    once = _spread(tl.div_rn(value * amax, span), TALL, BLOCKS)
    more = _spread(tl.div_rn(1.5 * value * amax, span), TALL, BLOCKS)
    bits = magnitude.to(tl.uint32, bitcast=True)
    power = (bits & 0xFF800000).to(tl.float32, bitcast=True)
    return power * tl.where((bits & 0x00400000) == 0, once[:, None], more[:, None])


@triton.jit
def _error(
    x, magnitude, value, amax, SPAN: tl.constexpr, ERROR: tl.constexpr, TALL: tl.constexpr, BLOCKS: tl.constexpr
):
    decoded = _decoded(magnitude, value, amax, SPAN, TALL, BLOCKS)
    return _block_error(decoded - tl.abs(x), ERROR, TALL, BLOCKS)


@triton.jit
def _encode(
    tile, amax, noise, LARGEST_VALUE: tl.constexpr, SPAN: tl.constexpr, ERROR: tl.constexpr,
    STOCHASTIC: tl.constexpr, TALL: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Encode float32 `[n, 16]` (rows, then blocks): return codes `[n, 16]`, and E4M3 bits, one for each block."""
    is_zero = amax < 1e-35
    encode = tl.where(is_zero, 0.0, tl.div_rn(SPAN + tl.zeros_like(amax), tl.where(is_zero, 1.0, amax)))
    decode = tl.where(is_zero, 0.0, tl.div_rn(1.0 + tl.zeros_like(amax), tl.where(is_zero, 1.0, encode)))
    peak = tl.max(tl.abs(tile), axis=1)
    if TALL:
        peak = tl.max(tl.reshape(peak, (16, BLOCKS)), axis=0)
    scale = tl.div_rn(peak, LARGEST_VALUE + tl.zeros_like(peak)) * encode

    magnitude, bits, value = _candidate(tile, scale, decode, noise, STOCHASTIC, TALL, BLOCKS, PTX)
    if ERROR > 0:
        other, other_bits, other_value = _candidate(tile, scale * 1.5, decode, noise, STOCHASTIC, TALL, BLOCKS, PTX)
        errors = _error(tile, magnitude, value, amax, SPAN, ERROR, TALL, BLOCKS)
        other_errors = _error(tile, other, other_value, amax, SPAN, ERROR, TALL, BLOCKS)
        prefers_four = other_errors < errors  # a tie goes to six
        bits = tl.where(prefers_four, other_bits, bits)
        rows_prefer_four = _spread(prefers_four.to(tl.int8), TALL, BLOCKS)
        magnitude = tl.where((rows_prefer_four == 1)[:, None], other, magnitude)

    # The sign is that of x, also for a zero; where the scale is 0, the product is a zero with the same sign.
    negative = tile.to(tl.uint32, bitcast=True) >> 31
    return _e2m1_code(magnitude) | (negative << 3), bits


# ----------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _load_tile(x, rows, columns, row_stride, column_stride, TALL: tl.constexpr, TILE: tl.constexpr):
    """Load a tile of 1 or 16 rows as float32 `[n, 16]` (rows, then blocks); also return its elements' indices."""
    ROWS: tl.constexpr = 16 if TALL else 1
    N: tl.constexpr = ROWS * TILE // 16
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row[:, None] * row_stride + column[None, :] * column_stride
    tile = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    index = row[:, None] * columns + column[None, :]
    return tl.reshape(tile, (N, 16)), tl.reshape(index, (N, 16))


@triton.jit
def quantize_kernel(
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
    code, bits = _encode(tile, amax, noise, LARGEST_VALUE, SPAN, ERROR, STOCHASTIC, TALL, BLOCKS, PTX)
    low, high = tl.split(tl.reshape(code, (ROWS, TILE // 2, 2)))
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1).to(tl.int64) * (TILE // 2) + tl.arange(0, TILE // 2)
    inside = (row < rows)[:, None] & (pair < columns // 2)[None, :]
    tl.store(codes + row[:, None] * (columns // 2) + pair[None, :], (low | (high << 4)).to(tl.uint8), mask=inside)
    block = tl.program_id(1).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (row < rows)[:, None] & (block < columns // 16)[None, :]
    tile_bits = tl.reshape(_spread(bits, TALL, BLOCKS), (ROWS, BLOCKS))
    tl.store(scales + row[:, None] * (columns // 16) + block[None, :], tile_bits, mask=inside)


@triton.jit
def hadamard_amax_kernel(x, amax, rows, columns, row_stride, column_stride, TILE: tl.constexpr):
    """Store each tile's largest absolute number after the transform, as `quantize_kernel` computes it."""
    tile, _ = _load_tile(x, rows, columns, row_stride, column_stride, False, TILE)
    largest = tl.max(tl.max(magnitude_bits(_hadamard(tile, TILE // 16)), axis=1), axis=0)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(amax + program, largest.to(tl.float32, bitcast=True))


@triton.jit
def dequantize_kernel(
    codes, scales, amax_pointer, out, num_blocks,
    SPAN: tl.constexpr, BF16: tl.constexpr, BLOCKS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    pair = tl.arange(0, 8)
    packed = tl.load(codes + block[:, None] * 8 + pair[None, :], mask=inside[:, None], other=0)
    value = tl.reshape(_e2m1_pairs(packed, PTX), (BLOCKS, 16))
    scale = e4m3_value(tl.load(scales + block, mask=inside, other=0))
    number = tl.div_rn(value * scale[:, None] * tl.load(amax_pointer), SPAN + tl.zeros_like(value))
    target = out + block[:, None] * 16 + tl.arange(0, 16)[None, :]
    if BF16:
        tl.store(target, _bf16_bits(number), mask=inside[:, None])
    else:
        tl.store(target, number, mask=inside[:, None])


@triton.jit
def read_nvfp4_frames_kernel(
    codes, scales, amax_pointer, mean, target, head_stride, length, slots, tokens,
    SPAN: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, HAS_MEAN: tl.constexpr, BF16: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    head, slot = tl.program_id(0) // length, tl.program_id(0) % length
    frame = head * slots + slot
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    row = frame.to(tl.int64) * tokens + token
    packed = tl.load(codes + row[:, None] * (DIM // 2) + tl.arange(0, DIM // 2)[None, :], mask=inside, other=0)
    value = tl.reshape(_e2m1_pairs(packed, PTX), (TOKENS * DIM // 16, 16))
    bits = tl.load(scales + row[:, None] * (DIM // 16) + tl.arange(0, DIM // 16)[None, :], mask=inside, other=0)
    amax = tl.load(amax_pointer + frame)
    scale = e4m3_value(tl.reshape(bits, (TOKENS * DIM // 16,))) * tl.div_rn(amax, SPAN + tl.zeros_like(amax))
    number = tl.reshape(value * scale[:, None], (TOKENS, DIM))
    if HAS_MEAN:
        number += tl.load(mean + frame * DIM + tl.arange(0, DIM))[None, :]
    out = target + head.to(tl.int64) * head_stride + slot.to(tl.int64) * tokens * DIM
    pointer = out + token[:, None] * DIM + tl.arange(0, DIM)[None, :]
    if BF16:
        tl.store(pointer, _bf16_bits(number), mask=inside)
    else:
        tl.store(pointer, number, mask=inside)


@triton.jit
def read_fp8_frames_kernel(
    codes, scales, target, head_stride, length, slots, size, TILE: tl.constexpr, BF16: tl.constexpr
):
    """`size` is that of a frame of one head, all of whose numbers have one scale."""
    head, slot = (tl.program_id(0) // length).to(tl.int64), (tl.program_id(0) % length).to(tl.int64)
    frame = head * slots + slot
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = index < size
    code = tl.load(codes + frame * size + index, mask=inside, other=0)
    number = e4m3_number(code) * tl.load(scales + frame)
    pointer = target + head * head_stride + slot * size + index
    if BF16:
        tl.store(pointer, _bf16_bits(number), mask=inside)
    else:
        tl.store(pointer, number, mask=inside)


@triton.jit
def _head_and_slot(chosen, heads, frames):
    """Return which head of which sample a program has, counted through, and which of the `frames` slots `chosen` of
    that sample."""
    head = (tl.program_id(0) // frames).to(tl.int64)
    return head, tl.load(chosen + head // heads * frames + tl.program_id(0) % frames)


@triton.jit
def center_frames_kernel(
    window, chosen, mean, amax, head_stride, heads, frames, slots, tokens, DIM: tl.constexpr, TOKENS: tl.constexpr
):
    """Store the mean over the tokens of a frame of a head, and the largest absolute number that is left without it."""
    head, slot = _head_and_slot(chosen, heads, frames)
    row, column = tl.arange(0, TOKENS)[:, None], tl.arange(0, DIM)
    pointer = window + head * head_stride + slot * tokens * DIM + row * DIM + column[None, :]
    total = tl.zeros((TOKENS, DIM), tl.float32)
    lowest = tl.full((TOKENS, DIM), float("inf"), tl.float32)
    highest = -lowest
    whole = tokens // TOKENS * TOKENS
    for start in tl.range(0, whole, TOKENS, loop_unroll_factor=2):
        number = tl.load(pointer + start * DIM).to(tl.float32)
        total += number
        lowest, highest = tl.minimum(lowest, number), tl.maximum(highest, number)
    inside = whole + row < tokens
    number = tl.load(pointer + whole * DIM, mask=inside, other=0.0).to(tl.float32)
    total += number
    lowest = tl.minimum(lowest, tl.where(inside, number, float("inf")))
    highest = tl.maximum(highest, tl.where(inside, number, float("-inf")))
    total = tl.sum(total, axis=0)
    center = tl.div_rn(total, tokens + tl.zeros_like(total))
    frame = head * slots + slot
    tl.store(mean + frame * DIM + column, center)
    # Rounding keeps the order of numbers: of no token is more left than of a channel's lowest or highest. A NaN is not
    # compared, but makes the mean one.
    left = magnitude_bits(tl.min(lowest, axis=0) - center)
    left = tl.maximum(left, magnitude_bits(tl.max(highest, axis=0) - center))
    tl.store(amax + frame, tl.max(left, axis=0).to(tl.float32, bitcast=True))


@triton.jit
def frame_amax_kernel(
    window, chosen, amax, head_stride, heads, frames, slots, size, DIVISOR: tl.constexpr, TILE: tl.constexpr
):
    """Store the largest absolute number of a frame of a head, divided by `DIVISOR`."""
    head, slot = _head_and_slot(chosen, heads, frames)
    index = tl.arange(0, TILE)
    pointer = window + head * head_stride + slot * size + index
    largest = tl.zeros((TILE,), tl.uint32)
    whole = size // TILE * TILE
    for start in tl.range(0, whole, TILE, loop_unroll_factor=2):
        largest = tl.maximum(largest, magnitude_bits(tl.load(pointer + start).to(tl.float32)))
    rest = tl.load(pointer + whole, mask=whole + index < size, other=0.0).to(tl.float32)
    largest = tl.maximum(largest, magnitude_bits(rest))
    number = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    tl.store(amax + head * slots + slot, tl.div_rn(number, DIVISOR + tl.zeros_like(number)))


@triton.jit
def _load_blocks(first, block, inside, BLOCKS: tl.constexpr):
    """Load blocks as float32 `[BLOCKS, 16]`. Loaded in halves, which in bfloat16 are the 16 bytes that a thread loads
    at once, a block is one thread's own: nothing about it is computed twice, or passed between threads."""
    pointer = first + block[:, None] * 16 + tl.arange(0, 8)[None, :]
    halves = tl.join(tl.load(pointer, inside[:, None], 0.0), tl.load(pointer + 8, inside[:, None], 0.0))
    return tl.reshape(tl.permute(halves, (0, 2, 1)), (BLOCKS, 16)).to(tl.float32)


@triton.jit
def write_nvfp4_frames_kernel(
    window, chosen, codes, scales, amax, mean, head_stride, heads, frames, slots, size,
    LARGEST_VALUE: tl.constexpr, SPAN: tl.constexpr, ERROR: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_MEAN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    head, slot = _head_and_slot(chosen, heads, frames)
    frame = head * slots + slot
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < size // 16
    number = _load_blocks(window + head * head_stride + slot * size, block, inside, BLOCKS)
    if HAS_MEAN:
        number -= _load_blocks(mean + frame * DIM, block % (DIM // 16), inside, BLOCKS)
    code, bits = _encode(number, tl.load(amax + frame), number, LARGEST_VALUE, SPAN, ERROR, False, False, BLOCKS, PTX)
    low, high = tl.split(tl.reshape(code, (BLOCKS, 8, 2)))
    pair = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(codes + frame * (size // 2) + pair, (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
    tl.store(scales + frame * (size // 16) + block, bits, mask=inside)


@triton.jit
def write_fp8_frames_kernel(
    window, chosen, codes, scales, head_stride, heads, frames, slots, size, TILE: tl.constexpr
):
    head, slot = _head_and_slot(chosen, heads, frames)
    frame = head * slots + slot
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = index < size
    number = tl.load(window + head * head_stride + slot * size + index, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + frame)
    scale = tl.where(scale < 1e-30, 1e-30, scale)  # a NaN stays
    tl.store(codes + frame * size + index, e4m3_quotient_bits(number, scale), mask=inside)
