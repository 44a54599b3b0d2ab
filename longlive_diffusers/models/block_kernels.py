"""A Triton kernel: what `take_blocks` of `sparse_attention.py` says in plain PyTorch, for keys and values at once."""

import triton
import triton.language as tl


@triton.jit
def take_blocks_kernel(
    key, value, chosen, taken_key, taken_value, key_batch_stride, key_head_stride, value_batch_stride,
    value_head_stride, strips, heads, count, size, TILE: tl.constexpr,
):  # fmt: skip
    """A program copies a part of a block of `size` numbers. Strips mostly choose the same blocks, so that they follow
    each other: what one has read, the next finds in the GPU's cache."""
    index = tl.program_id(0).to(tl.int64)
    strip, index = index % strips, index // strips
    place, index = index % count, index // count
    head, batch = index % heads, index // heads
    row = ((batch * strips + strip) * heads + head) * count + place
    number = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = number < size
    first = tl.load(chosen + row) * size
    key += batch * key_batch_stride + head * key_head_stride + first
    value += batch * value_batch_stride + head * value_head_stride + first
    own_key, own_value = tl.load(key + number, inside), tl.load(value + number, inside)
    tl.store(taken_key + row * size + number, own_key, inside)
    tl.store(taken_value + row * size + number, own_value, inside)
