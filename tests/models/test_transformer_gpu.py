"""What only a GPU can tell of a forward: which kernels run, and that nothing waits for the device."""

import torch
from torch.profiler import ProfilerActivity, profile

from tests.support.checks import needs_gpu
from tests.support.tiny_pipeline import CHUNK_SIZE, like, random_inputs, stream_chunks, tiny_cache, tiny_transformer


@needs_gpu
@torch.no_grad()
def test_attention_is_one_fused_kernel():
    model = tiny_transformer(attention_head_dim=64).to("cuda", torch.bfloat16)
    stream_chunks(model)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        stream_chunks(model)
    names = {event.key.lower() for event in profiled.key_averages()}
    assert any("flash" in name or "fmha" in name or "cudnn" in name for name in names), sorted(names)


@needs_gpu
@torch.no_grad()
def test_a_chunk_waits_for_nothing():
    """Neither the bookkeeping of the cache nor a forward; sinks are rotated again in the later chunks."""
    model = tiny_transformer(attention_head_dim=64).to("cuda", torch.bfloat16)
    cache = tiny_cache(model, relative_rope=True)
    inputs = like(model, random_inputs(CHUNK_SIZE))
    model(**inputs, kv_cache=begun(cache))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            model(**inputs, kv_cache=begun(cache))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def begun(cache):
    cache.begin_chunk(CHUNK_SIZE)
    return cache
