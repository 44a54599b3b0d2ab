"""Triton kernels: what `norm_silu.py`, `pending_sum.py` and `upsample.py` say in plain PyTorch, reading and writing
everything once.

Features are `[B, T, pixels, CHANNELS]`. A program computes PIXELS pixels of a frame; WIDE is a power of 2 that holds
all their channels.
"""

import triton
import triton.language as tl

from .norm_silu import SMALLEST_NORM


_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)


@triton.jit(do_not_specialize=["pixels", "count"])  # a single one would be no tensor
def norm_silu_after_kernel(
    kept, frames, gamma, bias, shortcut, joined, kept_after, total, pixels, count, scale,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """For one of the `2 + count` frames of the result. There may be no `bias`, `shortcut` or `total`."""
    time, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, WIDE)
    inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    place = pixel[:, None] * CHANNELS + channel[None, :]
    frame = pixels.to(tl.int64) * CHANNELS
    if time < 2:
        result = tl.load(kept + (batch * 2 + time) * frame + place, mask=inside, other=0.0)
    else:
        source = (batch * count + time - 2) * frame + place
        value = tl.load(frames + source, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
        if shortcut is not None:
            value += tl.load(shortcut + source, mask=inside, other=0.0).to(tl.float32)
        if total is not None:
            tl.store(total + source, value.to(total.dtype.element_ty), mask=inside)
        norm = tl.sqrt(tl.sum(value * value, axis=1))
        norm = tl.where(norm < _SMALLEST_NORM, _SMALLEST_NORM, norm)  # a NaN stays
        factor = tl.load(gamma + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32) * scale
        value = value / norm[:, None] * factor[None, :]
        result = (value / (1 + tl.exp(-value))).to(joined.dtype.element_ty)
    tl.store(joined + (batch * (2 + count) + time) * frame + place, result, mask=inside)
    if time >= count:
        tl.store(kept_after + (batch * 2 + time - count) * frame + place, result, mask=inside)


@triton.jit(do_not_specialize=["pixels", "columns", "skipped"])
def add_kernel(
    frames, bias, shortcut, pixels, columns, skipped,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr,
    TIMES: tl.constexpr, SCALE: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """For one frame, in place. There may be no `bias` or `shortcut`. A pixel of the shortcut stands for TIMES frames
    (without the `skipped` first ones) of SCALE x SCALE pixels, which go through its channels, each REPEATS times."""
    time, count, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, WIDE)
    inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    place = ((batch * count + time) * pixels + pixel)[:, None] * CHANNELS + channel[None, :]
    value = tl.load(frames + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    if shortcut is not None:
        FACTOR: tl.constexpr = TIMES * SCALE * SCALE
        row, column, time = pixel // columns, pixel % columns, time + skipped
        source = (batch * ((count + skipped) // TIMES) + time // TIMES) * (pixels // (SCALE * SCALE))
        source += row // SCALE * (columns // SCALE) + column // SCALE
        source_channel = channel[None, :]
        if FACTOR != REPEATS:
            repetition = (time % TIMES * SCALE + row % SCALE) * SCALE + column % SCALE
            source_channel = (channel[None, :] * FACTOR + repetition[:, None]) // REPEATS
        place_there = source[:, None] * (CHANNELS * FACTOR // REPEATS) + source_channel
        value += tl.load(shortcut + place_there, mask=inside, other=0.0).to(tl.float32)
    tl.store(frames + place, value.to(frames.dtype.element_ty), mask=inside)
