"""The Triton kernels of `operators.py`. A program has one token; all sums are in float32."""

import triton
import triton.language as tl

from ..fp8.kernels import e4m3_number, pair_of_codes, store_row


@triton.jit
def add_and_norm_kernel(
    hidden_states,
    update,
    gate,
    weight,
    bias,
    added,
    normed,
    scales,
    rows,
    rows_of_a_frame,
    dim,
    gate_batch_stride,
    gate_stride,
    weight_batch_stride,
    weight_stride,
    bias_batch_stride,
    bias_stride,
    eps,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
    NORMS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    PTX: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    batch, row = index // rows, index % rows
    frame = row // rows_of_a_frame
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    place = index * dim + columns

    x = tl.load(hidden_states + place, mask, other=0.0).to(tl.float32)
    if ADDS:
        more = tl.load(update + place, mask, other=0.0).to(tl.float32)
        if GATED:
            where = batch * gate_batch_stride + frame * gate_stride + columns
            more = more * tl.load(gate + where, mask, other=0.0).to(tl.float32)
        x = x + more
        tl.store(added + place, x.to(added.dtype.element_ty), mask)

    if NORMS:
        mean = tl.sum(x, 0) / dim
        centered = tl.where(mask, x - mean, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / dim + eps)
        factor = tl.load(weight + batch * weight_batch_stride + frame * weight_stride + columns, mask, other=0.0)
        shift = tl.load(bias + batch * bias_batch_stride + frame * bias_stride + columns, mask, other=0.0)
        result = centered * scale * factor.to(tl.float32) + shift.to(tl.float32)
        if QUANTIZES:  # what is rounded to bfloat16, as it would be to be read by the layer
            store_row(result.to(tl.bfloat16), normed, scales, index, dim, mask, BLOCK, PTX)
        else:
            tl.store(normed + place, result.to(normed.dtype.element_ty), mask)


@triton.jit
def gelu_in_fp8_kernel(x, codes, scales, columns, BLOCK: tl.constexpr, PTX: tl.constexpr):
    """x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), which is GELU in its tanh approximation."""
    index, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = column < columns
    number = tl.load(x + index * columns + column, mask, other=0.0).to(tl.float32)
    exponent = number * (-2.302208198 - 0.1029432397 * number * number)  # of 2
    result = (number / (1.0 + tl.exp2(exponent))).to(x.dtype.element_ty)
    store_row(result, codes, scales, index, columns, mask, BLOCK, PTX)


@triton.jit
def norm_rotate_and_write_kernel(
    query,
    key,
    value,
    query_weight,
    key_weight,
    rotary,
    rotated,
    key_cache,
    value_cache,
    token_slots,
    raw_key_cache,
    raw_slots,
    query_factor,
    key_factor,
    value_factor,
    tokens,
    dim,
    head_dim,
    rotary_batch_stride,
    key_batch_stride,
    key_head_stride,
    key_slot_stride,
    value_batch_stride,
    value_head_stride,
    value_slot_stride,
    raw_batch_stride,
    raw_head_stride,
    raw_frame_stride,
    raw_token_stride,
    num_frames,
    eps,
    HALF_BLOCK: tl.constexpr,
    KEEPS_RAW: tl.constexpr,
    CODES: tl.constexpr,
    PTX: tl.constexpr,
):
    """The second axis of the grid is the query, the key, the value. With CODES, what is written is E4M3, a pair of
    channels as 16 bits; strides and caches are those of pairs then."""
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, token = index // tokens, index % tokens
    pairs = tl.arange(0, HALF_BLOCK)
    mask = 2 * pairs < dim
    even, odd = index * dim + 2 * pairs, index * dim + 2 * pairs + 1
    head, channel = (2 * pairs) // head_dim, (2 * pairs) % head_dim
    slot = tl.load(token_slots + index)

    if CODES:
        own_factor = batch * (dim // head_dim) + head
        place = pairs - head * (head_dim // 2)
    else:
        place = channel

    if part == 2:
        where = value_cache + batch * value_batch_stride + head * value_head_stride + slot * value_slot_stride + place
        one, other = tl.load(value + even, mask, other=0.0), tl.load(value + odd, mask, other=0.0)
        if CODES:
            factor = tl.load(value_factor + own_factor, mask, other=0.0)
            tl.store(where, pair_of_codes(one.to(tl.float32) * factor, other.to(tl.float32) * factor, PTX), mask)
        else:
            tl.store(where, one.to(value_cache.dtype.element_ty), mask)
            tl.store(where + 1, other.to(value_cache.dtype.element_ty), mask)
    else:
        states, weight = query, query_weight
        if part == 1:
            states, weight = key, key_weight
        first = tl.load(states + even, mask, other=0.0).to(tl.float32)
        second = tl.load(states + odd, mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(first * first + second * second, 0) / dim + eps)
        first = first * scale * tl.load(weight + 2 * pairs, mask, other=0.0).to(tl.float32)
        second = second * scale * tl.load(weight + 2 * pairs + 1, mask, other=0.0).to(tl.float32)
        angle = rotary + batch * rotary_batch_stride + token * head_dim + channel
        cosine, sine = tl.load(angle, mask, other=0.0), tl.load(angle + 1, mask, other=0.0)
        turned_first, turned_second = first * cosine - second * sine, first * sine + second * cosine
        if part == 0:
            if CODES:
                factor = tl.load(query_factor + own_factor, mask, other=0.0)
                codes = pair_of_codes(turned_first * factor, turned_second * factor, PTX)
                tl.store(rotated + index * (dim // 2) + pairs, codes, mask)
            else:
                tl.store(rotated + even, turned_first.to(rotated.dtype.element_ty), mask)
                tl.store(rotated + odd, turned_second.to(rotated.dtype.element_ty), mask)
        else:
            where = key_cache + batch * key_batch_stride + head * key_head_stride + slot * key_slot_stride + place
            if CODES:
                factor = tl.load(key_factor + own_factor, mask, other=0.0)
                tl.store(where, pair_of_codes(turned_first * factor, turned_second * factor, PTX), mask)
            else:
                tl.store(where, turned_first.to(key_cache.dtype.element_ty), mask)
                tl.store(where + 1, turned_second.to(key_cache.dtype.element_ty), mask)
            if KEEPS_RAW:
                tokens_of_a_frame = tokens // num_frames
                frame = tl.load(raw_slots + batch * num_frames + token // tokens_of_a_frame)
                where = raw_key_cache + batch * raw_batch_stride + head * raw_head_stride + channel
                where += frame * raw_frame_stride + (token % tokens_of_a_frame) * raw_token_stride
                tl.store(where, first.to(raw_key_cache.dtype.element_ty), mask)
                tl.store(where + 1, second.to(raw_key_cache.dtype.element_ty), mask)


@triton.jit
def decode_heads_kernel(codes, scale, result, tokens, dim, head_dim, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    number = e4m3_number(tl.load(codes + index * dim + columns, mask, other=0))
    own_scale = tl.load(scale + index // tokens * (dim // head_dim) + columns // head_dim, mask, other=0.0)
    tl.store(result + index * dim + columns, (number * own_scale).to(result.dtype.element_ty), mask)
