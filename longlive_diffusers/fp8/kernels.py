"""Triton kernels, and pieces of kernels, that round to E4M3.

Ada, Hopper and Blackwell do so by an instruction, which is used where `PTX` is set. Elsewhere, rounding is done on the
bits, because Triton's interpreter, with which all this is tested on a CPU, converts some numbers wrongly. Both give
the same codes.
"""

from typing import Any

import triton
import triton.language as tl


# For compute capability 8.9 and up: the quotients of the numbers $1 to $4 by a scale, as four bytes. $5 is minus the
# scale, $9 its inverse. Element by element, this takes half the registers that the same in Triton does, and it has no
# branches, as `div_rn` does. The product with the inverse, which is rounded to nearest, is nearly the quotient;
# corrected by its remainder, it is wrong by less than one unit in the last place, and corrected once more it is the
# quotient, rounded to nearest (Markstein, "Computation of elementary functions on the IBM RISC System/6000", 1990).
_SCALED = """
    abs.f32 x, ${x};
    mul.rn.f32 y{i}, x, $9;
    fma.rn.f32 rest, y{i}, $5, x;
    fma.rn.f32 y{i}, rest, $9, y{i};
    fma.rn.f32 rest, y{i}, $5, x;
    fma.rn.f32 y{i}, rest, $9, y{i};
    copysign.f32 y{i}, ${x}, y{i};
"""
_TO_E4M3: Any = tl.constexpr(
    "{.reg .f32 x, rest, y0, y1, y2, y3; .reg .b16 low, high;"
    + "".join(_SCALED.format(i=i, x=i + 1) for i in range(4))
    + "cvt.rn.satfinite.e4m3x2.f32 low, y1, y0; cvt.rn.satfinite.e4m3x2.f32 high, y3, y2; mov.b32 $0, {low, high};}"
)
# The first of two numbers becomes the lower byte, which comes first in memory.
_PAIR_TO_E4M3: Any = tl.constexpr("cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;")


@triton.jit
def e4m3_magnitude(x) -> Any:
    """Return the bits of the E4M3 number that is nearest to float32 in [0, 448], ties to even; and that number."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
    small = x < 0.015625  # below 2^-6, neighbors are 2^-9 apart; adding 2^23 rounds to integers
    shifted = x * 512.0 + 8388608.0
    value = tl.where(small, (shifted - 8388608.0) * 0.001953125, rounded.to(tl.float32, bitcast=True))
    code = tl.where(small, shifted.to(tl.uint32, bitcast=True) & 15, (rounded >> 20) - 960)
    return code.to(tl.uint8), value


@triton.jit
def e4m3_bits(x):
    """Return the bits of the E4M3 numbers that are nearest to float32, saturating; NaN stays NaN."""
    return _signed_bits(tl.abs(x), x)


@triton.jit
def e4m3_quotient_bits(x, scale):
    """The same of x / scale."""
    return _signed_bits(tl.div_rn(tl.abs(x), scale + tl.zeros_like(x)), x)


@triton.jit
def _signed_bits(magnitude, x):
    """Return the bits of E4M3 numbers near a magnitude, with the signs of x."""
    bits, _ = e4m3_magnitude(tl.minimum(magnitude, 448.0))  # pyright: ignore[reportGeneralTypeIssues]
    bits = tl.where(magnitude != magnitude, 127, bits).to(tl.uint8)
    return bits | ((x.to(tl.uint32, bitcast=True) >> 31).to(tl.uint8) << 7)


@triton.jit
def _quotients(x, scale, PTX: tl.constexpr):
    """Return the bits of the E4M3 numbers that are nearest to float32 x / scale, saturating, ties to even.

    The instruction forgets the sign of NaN. With an infinite scale, all are NaN by `PTX`, and else those of
    infinities: all products with the row are NaN in either case.
    """
    if PTX:
        inverse = tl.div_rn(1.0 + tl.zeros_like(scale), scale)
        bits = tl.inline_asm_elementwise(
            _TO_E4M3, "=r,f,f,f,f,f,f,f,f,f,f,f,f", [x, -scale, inverse], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        bits = e4m3_quotient_bits(x, scale)
    return bits


@triton.jit
def e4m3_value(code):
    """Return the numbers, float32, that codes below 127 stand for."""
    code = code.to(tl.uint32)
    normal = (((code >> 3) + 120) << 23) | ((code & 7) << 20)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal.to(tl.float32, bitcast=True))


@triton.jit
def e4m3_number(code):
    """Return the numbers, float32, that any codes stand for."""
    magnitude = tl.where((code & 127) == 127, float("nan"), e4m3_value(code & 127))
    return tl.where(code >= 128, -magnitude, magnitude)


@triton.jit
def magnitude_bits(x):
    """Return |x| as an integer, in whose order NaN comes after all numbers: `tl.max` of numbers would drop a NaN."""
    return x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def store_row(number, codes, scales, row, columns, mask, BLOCK: tl.constexpr, PTX: tl.constexpr):
    """Quantize a row, `[BLOCK]`, to E4M3 by the scale of its largest number; beyond its columns, it is 0.

    The largest is found in the dtype that the row has, in which it is kept in registers meanwhile: in float32, a long
    row would leave no place for a second program.
    """
    if number.dtype.primitive_bitwidth == 16:
        largest = tl.max(number.to(tl.uint16, bitcast=True) & 0x7FFF, axis=0).to(tl.uint16)
    else:
        largest = tl.max(magnitude_bits(number), axis=0)
    amax = largest.to(number.dtype, bitcast=True).to(tl.float32)
    amax = tl.where(amax < 1e-12, 1e-12, amax)  # a NaN stays
    scale = tl.div_rn(amax, 448.0 + tl.zeros_like(amax))
    tl.store(scales + row, scale)
    bits = _quotients(number.to(tl.float32), scale, PTX)
    # By eights, as 16-bit numbers are loaded, and not by sixteens: each thread then holds the same numbers as in a
    # kernel that does not quantize, and sums are made in the same order.
    place = tl.multiple_of(codes + row * columns + tl.arange(0, BLOCK), 8)
    tl.store(place, bits, mask)


@triton.jit
def quantize_rows_kernel(x, codes, scales, columns, row_stride, column_stride, BLOCK: tl.constexpr, PTX: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = column < columns
    pointer = x + row * row_stride + column.to(tl.int64) * column_stride
    number = tl.load(pointer, mask=mask, other=0.0)
    store_row(number, codes, scales, row, columns, mask, BLOCK, PTX)


@triton.jit
def pair_of_codes(first, second, PTX: tl.constexpr):
    """Round two numbers to E4M3, saturating: 16 bits, of which the first has the lower."""
    if PTX:
        pair = tl.inline_asm_elementwise(
            _PAIR_TO_E4M3, "=h,f,f", [first, second], dtype=tl.int16, is_pure=True, pack=1
        )
    else:
        bits = e4m3_bits(first).to(tl.uint16) | (e4m3_bits(second).to(tl.uint16) << 8)
        pair = bits.to(tl.int16, bitcast=True)
    return pair
