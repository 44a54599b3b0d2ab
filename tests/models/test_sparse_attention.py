"""Block-sparse attention over the cache, against dense attention under the mask of what was chosen."""

import pytest
import torch

from longlive_diffusers import KVCache
from longlive_diffusers.models import sparse_attention
from longlive_diffusers.models.attend import attend
from longlive_diffusers.models.sparse_attention import (
    AttendedBlocks,
    attend_to_blocks,
    choose_blocks,
    in_strips,
    largest_divisor,
    plan_blocks,
)
from tests.support.tiny_pipeline import CHUNK_SIZE, tiny_arguments, tiny_pipeline, tiny_transformer


BATCH, HEADS, HEAD_DIM, TOKENS, FRAMES, SLOTS = 2, 3, 8, 24, 2, 6
ALWAYS_SEEN = [[True, False, False, False, True, True], [True, True, False, False, True, True]]


def states(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(BATCH, frames * TOKENS, HEADS, HEAD_DIM, generator=generator).to(dtype)
        for frames in (FRAMES, SLOTS, SLOTS)
    ]


def planned(density: float, always_seen=ALWAYS_SEEN, tokens: int = TOKENS) -> AttendedBlocks:
    blocks = plan_blocks(always_seen, tokens, density)
    assert blocks is not None
    return blocks


def masked(query, key, value, blocks: AttendedBlocks) -> torch.Tensor:
    """Dense attention under a mask of the blocks that each token's strip and head has chosen."""
    chosen = choose_blocks(in_strips(query, blocks), key, blocks)
    strip_of_token = torch.arange(query.shape[1]) % blocks.tokens // (blocks.tokens // blocks.strips)
    block_of_key = torch.arange(key.shape[1]) // blocks.size
    by_block = torch.zeros(*chosen.shape[:3], key.shape[1] // blocks.size, dtype=torch.bool).scatter(3, chosen, True)
    mask = by_block[:, strip_of_token][..., block_of_key].transpose(1, 2)  # [B, heads, queries, keys]
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("density", [0.75, 0.5, 0.25, 0.01])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_it_is_attention_under_the_mask_of_what_was_chosen(density, dtype, tolerance):
    query, key, value = states(dtype)
    blocks = planned(density)
    with torch.no_grad():
        found, expected = (compute(query, key, value, blocks) for compute in (attend_to_blocks, masked))
    assert found.dtype == dtype and (found.float() - expected.float()).abs().max() < tolerance


@pytest.mark.parametrize("tokens", [1, 7, 16, 91, 96, 880])
@pytest.mark.parametrize("density", [0.5, 0.1])
def test_frames_of_any_size_are_divided(tokens, density):
    blocks = planned(density, tokens=tokens)
    assert tokens % blocks.size == 0 and tokens % blocks.strips == 0 and blocks.size <= 64
    query, key, value = (torch.randn(2, frames * tokens, 1, 4) for frames in (FRAMES, SLOTS, SLOTS))
    found = attend_to_blocks(query, key, value, blocks)
    assert torch.allclose(found, masked(query, key, value, blocks), atol=1e-5)


def test_every_sample_has_the_blocks_that_the_one_with_most_needs():
    """4 blocks a frame: 12 are always seen of the first sample, 16 of the second; and a part of the other 12 and 8."""
    tokens = 16
    assert planned(0.5, tokens=tokens).count == max(12 + 6, 16 + 4)
    assert planned(0.1, tokens=tokens).count == max(12 + 2, 16 + 1)


@pytest.mark.parametrize("density", [1.0, 0.99])
def test_nothing_is_planned_where_everything_is_seen(density):
    assert plan_blocks(ALWAYS_SEEN, 16, density) is None
    assert plan_blocks([[True, True]], 16, 0.1) is None


def test_each_head_and_strip_chooses_what_it_points_to():
    """Each queries' own block has keys like them; always seen ones are there, too."""
    tokens, always_seen = 16, [[True, False, False, False, True]]
    blocks = planned(0.1, always_seen, tokens)
    assert (blocks.size, blocks.strips, blocks.count) == (4, 2, 8 + 2)
    wanted = {(0, 0): 5, (0, 1): 9, (1, 0): 12, (1, 1): 15}  # (strip, head): block
    query, key = torch.zeros(1, tokens, 2, 4), torch.zeros(1, 5 * tokens, 2, 4)
    for (strip, head), block in wanted.items():
        query[:, strip * 8 : strip * 8 + 8, head, strip] = 1.0
        key[:, block * 4 : block * 4 + 4, head, strip] = 1.0
    chosen = choose_blocks(in_strips(query, blocks), key, blocks)
    for (strip, head), block in wanted.items():
        own = set(chosen[0, strip, head].tolist())
        assert block in own and {0, 1, 2, 3, 16, 17, 18, 19} <= own


@pytest.mark.parametrize(("number", "most", "divisor"), [(880, 64, 55), (96, 24, 24), (96, 23, 16), (7, 4, 1)])
def test_largest_divisor(number, most, divisor):
    assert largest_divisor(number, most) == divisor


# -- what a cache plans ----------------------------------------------------------------------------------------------


def cache(**changes) -> KVCache:
    settings = {"window_size": 8, "sink_size": 2, "chunk_size": 2, "multi_shot_sink": True, "attention_density": 0.25}
    return KVCache(1, 2, 2, 16, 4, 4, **{**settings, **changes})


def seen(kv_cache: KVCache, sample: int) -> set[int]:
    """The frames that the open chunk attends to in any case."""
    blocks = kv_cache.chunk.blocks
    assert blocks is not None
    by_slot = blocks.is_always_seen[sample].view(kv_cache.num_cached_frames, -1)
    assert (by_slot == by_slot[:, :1]).all()
    slots = kv_cache._samples[sample].slots
    return {slots[slot].index for slot in by_slot[:, 0].nonzero().flatten().tolist()}


@pytest.mark.parametrize("relative_rope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, "fp8", "nvfp4", "fp8_attention"])
def test_sinks_the_shots_beginning_and_the_own_chunk_are_always_seen(relative_rope, dtype):
    """The second sample begins a shot with frames 4 and 5."""
    kv_cache = cache(relative_rope=relative_rope, dtype=dtype)
    expected = [
        (None, None),  # frames 0, 1: nothing else is there
        (None, None),  # 2, 3
        ({0, 1, 4, 5}, {0, 1, 4, 5}),
        ({0, 1, 6, 7}, {0, 1, 4, 5, 6, 7}),
        ({0, 1, 8, 9}, {0, 1, 4, 5, 8, 9}),  # the window is full
        ({0, 1, 10, 11}, {0, 1, 4, 5, 10, 11}),
    ]
    for index, frames in enumerate(expected):
        kv_cache.begin_chunk(2, opens_shot=[False, index == 2])
        kv_cache.finish_chunk()
        if frames[0] is None:
            assert kv_cache.chunk.blocks is None
        else:
            assert (seen(kv_cache, 0), seen(kv_cache, 1)) == frames


def test_the_beginning_of_the_shot_before_is_history():
    kv_cache = cache()
    for index in range(4):
        kv_cache.begin_chunk(2, opens_shot=index in (1, 3))
    assert seen(kv_cache, 0) == {0, 1, 6, 7}  # 2 and 3 opened the shot that ends here


def test_history_is_rewritten_under_the_same_rule():
    kv_cache = cache()
    for _ in range(4):
        kv_cache.begin_chunk(2)
        kv_cache.finish_chunk()
    plans = [kv_cache.chunk.blocks is None or seen(kv_cache, 0) for _ in kv_cache.recache()]
    assert plans == [True, True, {0, 1, 4, 5}, {0, 1, 6, 7}]


# -- in a stream -----------------------------------------------------------------------------------------------------


def stream(**changes) -> torch.Tensor:
    pipe = tiny_pipeline(transformer=tiny_transformer(attention_head_dim=16, seed=2))
    return pipe(**tiny_arguments(num_frames=45, window_size=10, **changes)).frames


STREAMS = {
    "plain": {},
    "bfloat16": {"kv_cache_dtype": torch.bfloat16},
    "fp8": {"kv_cache_dtype": "fp8"},
    "nvfp4": {"kv_cache_dtype": "nvfp4"},
    "attention in fp8": {"kv_cache_dtype": "fp8_attention"},
    "relative RoPE": {"relative_rope": True},
    "relative RoPE, nvfp4": {"relative_rope": True, "kv_cache_dtype": "nvfp4"},
    "guidance": {"guidance_scale": 3.0},
    "a batch of different shots": {
        "prompt": None,
        "shot_prompts": [["a cat", "a dog"], ["a cat", "a dog"]],
        "chunks_per_shot": [[1, 5], [3, 3]],
    },
    "no clean passes": {"clean_pass": "last", "kv_cache_dtype": "nvfp4"},
}


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
def test_a_stream_sees_what_is_chosen(monkeypatch, changes):
    found = stream(attention_density=0.3, **changes)
    monkeypatch.setattr(
        "longlive_diffusers.models.layer_kv_cache.attend_to_blocks",
        lambda query, key, value, blocks, backend, scratch: masked(query, key, value, blocks),
    )
    assert distance(found, stream(attention_density=0.3, **changes)) < 1e-5
    assert distance(found, stream(**changes)) > 1e-4


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_a_density_of_one_is_dense_attention_bit_for_bit():
    assert torch.equal(stream(attention_density=1.0), stream())


def test_a_forward_with_gradients_sees_everything():
    transformer = tiny_transformer()
    latents, text = torch.randn(1, 8, 8, 4, 4), torch.randn(1, 8, 16)

    def outputs(density: float, with_gradients: bool) -> torch.Tensor:
        kv_cache = transformer.create_kv_cache(
            1, 4, 4, window_size=8, sink_size=2, multi_shot_sink=True, attention_density=density
        )
        with torch.set_grad_enabled(with_gradients):
            for chunk in latents.split(CHUNK_SIZE, dim=2):
                kv_cache.begin_chunk(CHUNK_SIZE)
                output = transformer(chunk.contiguous(), torch.zeros(1), text, kv_cache=kv_cache).sample
        return output.detach()

    assert torch.equal(outputs(0.1, True), outputs(1.0, True))
    assert not torch.equal(outputs(0.1, False), outputs(1.0, False))


def test_half_the_density_is_less_work():
    """Counted: matrix products of queries and keys, and of weights and values."""
    from torch.utils.flop_counter import FlopCounterMode

    always_seen = [[slot < 8 or slot >= 24 for slot in range(32)]]
    query, key, value = (torch.empty(1, frames * 880, 24, 128, device="meta") for frames in (8, 32, 32))

    def flops(density: float) -> int:
        blocks = plan_blocks(always_seen, 880, density)
        with FlopCounterMode(display=False) as counter:
            if blocks is None:
                attend(query, key, value)
            else:
                plan = AttendedBlocks(blocks.is_always_seen.to("meta"), blocks.count, blocks.size, blocks.strips, 880)
                attend_to_blocks(query, key, value, plan)
        return counter.get_total_flops()

    shares = [flops(density) / flops(1.0) for density in (0.75, 0.5, 0.25, 0.1)]
    assert shares == pytest.approx([28 / 32, 24 / 32, 20 / 32, 17.6 / 32], abs=2e-3)


@pytest.mark.parametrize("value", [0, -0.5, 1.01, float("nan"), float("inf"), "half", None, True])
def test_what_a_density_cannot_be(value):
    message = "`attention_density` must be a number above 0 and at most 1, got "
    with pytest.raises(ValueError, match=message):
        stream(attention_density=value)
    with pytest.raises(ValueError, match=message):
        cache(attention_density=value)
    with pytest.raises(ValueError, match=message):
        sparse_attention.check_density(value)
