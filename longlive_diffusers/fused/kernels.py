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
    query_stride,
    key_stride,
    value_stride,
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
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEEPS_RAW: tl.constexpr,
    CODES: tl.constexpr,
    PTX: tl.constexpr,
):
    """The second axis of the grid is the query, the key, the value. With CODES, what is written is E4M3, a pair of
    channels as 16 bits; strides and caches are those of pairs then."""
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, token = index // tokens, index % tokens
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    head, channel = columns // HEAD_DIM, columns % HEAD_DIM
    pair = tl.arange(0, BLOCK // 2)
    pair_mask, pair_head, pair_channel = pair < dim // 2, pair // (HEAD_DIM // 2), pair % (HEAD_DIM // 2)
    own_factor = batch * (dim // HEAD_DIM) + pair_head
    slot = tl.load(token_slots + index)

    if part == 2:
        cached = value_cache + batch * value_batch_stride + slot * value_slot_stride
        number = tl.load(value + index * value_stride + columns, mask, other=0.0)
        if CODES:
            factor = tl.load(value_factor + own_factor, pair_mask, other=0.0)
            codes = _pairs_of_codes(number.to(tl.float32), factor, BLOCK, PTX)
            tl.store(cached + pair_head * value_head_stride + pair_channel, codes, pair_mask)
        else:
            tl.store(cached + head * value_head_stride + channel, number.to(value_cache.dtype.element_ty), mask)
    else:
        states, weight = query + index * query_stride, query_weight
        if part == 1:
            states, weight = key + index * key_stride, key_weight
        x = tl.load(states + columns, mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / dim + eps)
        x = x * scale * tl.load(weight + columns, mask, other=0.0).to(tl.float32)
        angle = rotary + batch * rotary_batch_stride + token * HEAD_DIM + channel
        cosine, sine = tl.split(tl.reshape(tl.load(angle, mask, other=0.0), (BLOCK // 2, 2)))
        first, second = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        turned = tl.reshape(tl.join(first * cosine - second * sine, first * sine + second * cosine), (BLOCK,))
        if part == 0:
            if CODES:
                factor_of_query = tl.load(query_factor + own_factor, pair_mask, other=0.0)
                codes_of_query = _pairs_of_codes(turned, factor_of_query, BLOCK, PTX)
                tl.store(rotated + index * (dim // 2) + pair, codes_of_query, pair_mask)
            else:
                tl.store(rotated + index * dim + columns, turned.to(rotated.dtype.element_ty), mask)
        else:
            key_place = key_cache + batch * key_batch_stride + slot * key_slot_stride
            if CODES:
                factor_of_key = tl.load(key_factor + own_factor, pair_mask, other=0.0)
                codes_of_key = _pairs_of_codes(turned, factor_of_key, BLOCK, PTX)
                tl.store(key_place + pair_head * key_head_stride + pair_channel, codes_of_key, pair_mask)
            else:
                tl.store(key_place + head * key_head_stride + channel, turned.to(key_cache.dtype.element_ty), mask)
            if KEEPS_RAW:
                tokens_of_a_frame = tokens // num_frames
                frame = tl.load(raw_slots + batch * num_frames + token // tokens_of_a_frame)
                where = raw_key_cache + batch * raw_batch_stride + head * raw_head_stride + channel
                where += frame * raw_frame_stride + (token % tokens_of_a_frame) * raw_token_stride
                tl.store(where, x.to(raw_key_cache.dtype.element_ty), mask)


@triton.jit
def _pairs_of_codes(x, factor, BLOCK: tl.constexpr, PTX: tl.constexpr):
    """Round `[BLOCK]` numbers, each two times their own factor, to E4M3: `[BLOCK / 2]` pairs."""
    first, second = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    return pair_of_codes(first * factor, second * factor, PTX)


@triton.jit
def decode_heads_kernel(codes, scale, result, tokens, dim, head_dim, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    number = e4m3_number(tl.load(codes + index * dim + columns, mask, other=0))
    own_scale = tl.load(scale + index // tokens * (dim // head_dim) + columns // head_dim, mask, other=0.0)
    tl.store(result + index * dim + columns, (number * own_scale).to(result.dtype.element_ty), mask)
