"""A Triton kernel: what `norm_silu.py` says in plain PyTorch, reading and writing everything once."""

import triton
import triton.language as tl

from .norm_silu import SMALLEST_NORM


_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)


@triton.jit(do_not_specialize=["pixels", "count"])  # a single one would be no tensor
def norm_silu_after_kernel(
    kept, frames, gamma, joined, kept_after, pixels, count, scale,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program makes some pixels of one of the `2 + count` frames of the result; WIDE is a power of 2 that holds all
    CHANNELS. Features are `[B, T, pixels, CHANNELS]`."""
    time, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, WIDE)
    inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    place = pixel[:, None] * CHANNELS + channel[None, :]
    frame = pixels.to(tl.int64) * CHANNELS
    if time < 2:
        result = tl.load(kept + (batch * 2 + time) * frame + place, mask=inside, other=0.0)
    else:
        value = tl.load(frames + (batch * count + time - 2) * frame + place, mask=inside, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(value * value, axis=1))
        norm = tl.where(norm < _SMALLEST_NORM, _SMALLEST_NORM, norm)  # a NaN stays
        factor = tl.load(gamma + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32) * scale
        value = value / norm[:, None] * factor[None, :]
        result = (value / (1 + tl.exp(-value))).to(joined.dtype.element_ty)
    tl.store(joined + (batch * (2 + count) + time) * frame + place, result, mask=inside)
    if time >= count:
        tl.store(kept_after + (batch * 2 + time - count) * frame + place, result, mask=inside)
