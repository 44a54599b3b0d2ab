"""The rolling cache: which frames are held, where, and how their keys are rotated."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_diffusers import KVCache
from longlive_diffusers.models.kv_cache import CachedFrame
from longlive_diffusers.models.rotary import apply_rotary, rotary_embedding
from tests.support.tiny_pipeline import random_inputs, tiny_cache, tiny_transformer


HEADS, HEAD_DIM, HEIGHT, WIDTH = 2, 12, 1, 2
TOKENS = HEIGHT * WIDTH


def make_cache(num_layers: int = 1, batch_size: int = 1, **options) -> KVCache:
    defaults = {"window_size": 6, "sink_size": 2, "chunk_size": 2, "multi_shot_sink": True}
    return KVCache(num_layers, batch_size, HEADS, HEAD_DIM, HEIGHT, WIDTH, **{**defaults, **options})


def held(cache: KVCache, row: int = 0) -> list[int]:
    return [frame.index for frame in cache.cached_frames(row)]


def positions(cache: KVCache, row: int = 0) -> list[float]:
    return [frame.position for frame in cache.cached_frames(row)]


# -- what is held, as tables -----------------------------------------------------------------------------------------
#
# Each line is a chunk of two frames: the shots that it opens, and all frames that are held while it is made.


def play(table: list[tuple[bool, list[int]]], **options) -> None:
    cache = make_cache(**options)
    for number, (opens_shot, expected) in enumerate(table):
        cache.begin_chunk(2, opens_shot=opens_shot)
        assert held(cache) == expected, f"chunk {number}"


def test_a_sliding_window():
    play(
        [
            (False, [0, 1]),
            (False, [0, 1, 2, 3]),
            (False, [0, 1, 2, 3, 4, 5]),
            (False, [2, 3, 4, 5, 6, 7]),
            (False, [4, 5, 6, 7, 8, 9]),
        ],
        sink_size=0,
        multi_shot_sink=False,
    )


def test_sinks_are_never_forgotten():
    play(
        [
            (False, [0, 1]),
            (False, [0, 1, 2, 3]),
            (False, [0, 1, 2, 3, 4, 5]),
            (False, [0, 1, 4, 5, 6, 7]),
            (False, [0, 1, 6, 7, 8, 9]),
            (False, [0, 1, 8, 9, 10, 11]),
        ],
        multi_shot_sink=False,
    )


def test_a_cut_means_nothing_without_multi_shot_sinks():
    play(
        [
            (False, [0, 1]),
            (True, [0, 1, 2, 3]),
            (False, [0, 1, 2, 3, 4, 5]),
            (True, [0, 1, 4, 5, 6, 7]),
            (False, [0, 1, 6, 7, 8, 9]),
        ],
        multi_shot_sink=False,
    )


def test_the_opening_of_the_current_shot_is_pinned():
    play(
        [
            (False, [0, 1]),
            (False, [0, 1, 2, 3]),
            (True, [0, 1, 2, 3, 4, 5]),
            (False, [0, 1, 4, 5, 6, 7]),  # 4 and 5 opened the shot
            (False, [0, 1, 4, 5, 8, 9]),  # and stay, so that 6 and 7 go
            (False, [0, 1, 4, 5, 10, 11]),
        ]
    )


def test_a_new_shot_replaces_the_pin_once_its_first_chunk_is_finished():
    play(
        [
            (False, [0, 1]),
            (True, [0, 1, 2, 3]),
            (False, [0, 1, 2, 3, 4, 5]),
            (True, [0, 1, 2, 3, 6, 7]),  # while it is made, the old shot's opening is still pinned
            (False, [0, 1, 6, 7, 8, 9]),  # now its own is
            (True, [0, 1, 6, 7, 10, 11]),
            (True, [0, 1, 10, 11, 12, 13]),
            (False, [0, 1, 12, 13, 14, 15]),
        ]
    )


def test_a_wider_window_forgets_an_old_pin_only_when_its_turn_comes():
    play(
        [
            (False, [0, 1]),
            (True, [0, 1, 2, 3]),
            (False, [0, 1, 2, 3, 4, 5]),
            (True, [0, 1, 2, 3, 4, 5, 6, 7]),
            (False, [0, 1, 4, 5, 6, 7, 8, 9]),  # 2 and 3 are pinned no more, and the oldest
            (False, [0, 1, 6, 7, 8, 9, 10, 11]),
            (False, [0, 1, 6, 7, 10, 11, 12, 13]),
        ],
        window_size=8,
    )


def test_with_more_sinks_than_a_chunk_a_whole_chunk_is_pinned():
    play(
        [
            (False, [0, 1]),
            (False, [0, 1, 2, 3]),
            (True, [0, 1, 2, 3, 4, 5]),
            (False, [0, 1, 2, 3, 4, 5, 6, 7]),
            (False, [0, 1, 2, 3, 4, 5, 8, 9]),
        ],
        window_size=8,
        sink_size=4,
    )


def test_an_odd_window_is_filled():
    """No more frames are evicted than there is no room for, as in the reference."""
    play(
        [
            (False, [0, 1]),
            (False, [0, 1, 2, 3]),
            (False, [0, 1, 2, 3, 4, 5]),
            (False, [0, 1, 3, 4, 5, 6, 7]),
            (False, [0, 1, 5, 6, 7, 8, 9]),
        ],
        window_size=7,
    )


def test_an_old_pin_may_go_in_parts():
    play(
        [
            (False, [0, 1]),
            (True, [0, 1, 2, 3]),
            (True, [0, 1, 2, 3, 4, 5]),
            (False, [0, 1, 3, 4, 5, 6, 7]),  # 4 and 5 are pinned now, and 2 the oldest that is not
            (False, [0, 1, 4, 5, 7, 8, 9]),
        ],
        window_size=7,
    )


def test_sinks_may_end_within_a_chunk_without_multi_shot_sinks():
    play(
        [
            (False, [0, 1]),
            (False, [0, 1, 2, 3]),
            (False, [0, 1, 2, 3, 4, 5]),
            (False, [0, 1, 2, 5, 6, 7]),
            (False, [0, 1, 2, 7, 8, 9]),
        ],
        sink_size=3,
        multi_shot_sink=False,
    )


def test_where_too_few_may_go_a_free_slot_serves():
    """Three sinks, two frames of the chunk: a window of five is just enough."""
    play(
        [
            (False, [0, 1]),
            (False, [0, 1, 2, 3]),
            (False, [0, 1, 2, 4, 5]),
            (False, [0, 1, 2, 6, 7]),
        ],
        window_size=5,
        sink_size=3,
        multi_shot_sink=False,
    )


def test_each_video_of_a_batch_has_its_own_shots():
    cache = make_cache(batch_size=2)
    expected = [
        ([False, False], [0, 1], [0, 1]),
        ([True, False], [0, 1, 2, 3], [0, 1, 2, 3]),
        ([False, True], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([False, False], [0, 1, 2, 3, 6, 7], [0, 1, 4, 5, 6, 7]),
        ([False, False], [0, 1, 2, 3, 8, 9], [0, 1, 4, 5, 8, 9]),
    ]
    for opens_shot, first, second in expected:
        cache.begin_chunk(2, opens_shot=opens_shot)
        assert (held(cache, 0), held(cache, 1)) == (first, second)


def test_a_last_chunk_may_be_short():
    cache = make_cache()
    for _ in range(3):
        cache.begin_chunk(2)
    plan = cache.begin_chunk(1)
    assert (plan.num_frames, plan.length) == (1, 6)
    assert held(cache) == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "fp8"])
@pytest.mark.parametrize("relative_rope", [False, True])
def test_a_video_shorter_than_the_window_takes_memory_for_its_own_frames(dtype, relative_rope):
    options = {"window_size": 32, "sink_size": 8, "dtype": dtype, "relative_rope": relative_rope}
    for num_frames, num_slots in ((2, 2), (10, 10), (32, 32), (34, 32), (10**9, 32)):
        cache = make_cache(**options, num_frames=num_frames)
        expected = make_cache(
            window_size=num_slots, sink_size=0, dtype=dtype, relative_rope=relative_rope, multi_shot_sink=False
        )
        raw = 0 if cache[0].raw_key is None else cache[0].raw_key.nbytes
        assert cache.num_bytes - raw == expected.num_bytes
        assert (raw > 0) == (relative_rope and num_frames > 32), "nothing is rotated again before the first eviction"


@pytest.mark.parametrize("relative_rope", [False, True])
def test_a_short_video_is_cached_as_in_a_cache_of_the_whole_window(relative_rope):
    options = {"window_size": 32, "sink_size": 8, "relative_rope": relative_rope}
    short, whole = make_cache(num_frames=10, **options), make_cache(**options)
    for chunk in range(5):
        plans = [cache.begin_chunk(2, opens_shot=chunk == 2, rope_offset=8.0) for cache in (short, whole)]
        assert short.cached_frames() == whole.cached_frames()
        assert torch.equal(plans[0].rotary, plans[1].rotary)
        assert torch.equal(plans[0].token_slots, plans[1].token_slots)


@pytest.mark.parametrize("window_size", [6, 8, 32])
def test_a_video_does_not_go_beyond_the_length_it_was_made_for(window_size):
    cache = make_cache(window_size=window_size, num_frames=7)
    for _ in range(3):
        cache.begin_chunk(2)
    with pytest.raises(ValueError, match="video of 7 latent frames; after 6, there is no room for 2 more"):
        cache.begin_chunk(2)
    cache.begin_chunk(1)
    cache.reset()
    cache.begin_chunk(2)


@pytest.mark.parametrize("num_frames", [0, -1, 4.0, True, "4"])
def test_a_cache_is_for_at_least_one_frame(num_frames):
    with pytest.raises(ValueError, match=f"`num_frames` must be an integer of at least 1, got {num_frames!r}"):
        make_cache(num_frames=num_frames)


def test_time_positions_are_frame_indices_and_the_offset_of_the_shot():
    cache = make_cache(batch_size=2)
    cache.begin_chunk(2)
    cache.begin_chunk(2, opens_shot=[True, False], rope_offset=[8.0, 0.0])
    cache.begin_chunk(2, opens_shot=[False, True], rope_offset=[8.0, 2.5])
    assert positions(cache, 0) == [0.0, 1.0, 10.0, 11.0, 12.0, 13.0]
    assert positions(cache, 1) == [0.0, 1.0, 2.0, 3.0, 6.5, 7.5]


def test_relative_positions_close_the_gap_behind_the_sinks():
    """Counted from the newest frame backwards; shot offsets play no part."""
    cache = make_cache(relative_rope=True)
    seen = []
    for offset in (0.0, 8.0, 8.0, 16.0, 16.0):
        cache.begin_chunk(2, rope_offset=offset)
        seen.append(list(zip(held(cache), positions(cache), strict=True)))
    assert seen[2] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0)]
    assert seen[3] == [(0, 2.0), (1, 3.0), (4, 4.0), (5, 5.0), (6, 6.0), (7, 7.0)]
    assert seen[4] == [(0, 4.0), (1, 5.0), (6, 6.0), (7, 7.0), (8, 8.0), (9, 9.0)]


# -- what is held, against a model of the specification --------------------------------------------------------------


@dataclass
class Scenario:
    """A cache's sizes, and for each chunk which videos of the batch open a shot with it."""

    options: dict
    shots: list[list[bool]]

    @property
    def batch_size(self) -> int:
        return len(self.shots[0])

    def make_cache(self, **changes) -> KVCache:
        return make_cache(batch_size=self.batch_size, **self.options, **changes)


@st.composite
def scenarios(draw) -> Scenario:
    chunk = draw(st.integers(1, 4))
    multi_shot_sink = draw(st.booleans())
    sink = chunk * draw(st.integers(0, 3)) if multi_shot_sink else draw(st.integers(0, 7))
    pinned = min(sink, chunk) if multi_shot_sink else 0
    window = sink + pinned + chunk + draw(st.integers(0, 9))
    batch = draw(st.integers(1, 3))
    num_chunks = window // chunk + draw(st.integers(0, 8))  # so that most of them overflow
    shots = [[draw(st.booleans()) for _ in range(batch)] for _ in range(num_chunks)]
    sizes = {"window_size": window, "sink_size": sink, "chunk_size": chunk, "multi_shot_sink": multi_shot_sink}
    return Scenario(sizes, shots)


def frames_held(options: dict, opens: list[bool]) -> list[list[int]]:
    """The frames of one video held during each chunk, by the rules alone, with no notion of slots.

    A frame that is held stays, unless it is among the oldest that have to go: as many as there is no room for, never a
    sink, never the opening of the shot that was running when the chunk before was finished.
    """
    chunk, sink, window = options["chunk_size"], options["sink_size"], options["window_size"]
    pin_size = min(sink, chunk) if options["multi_shot_sink"] else 0
    history, frames = [], []
    for number in range(len(opens)):
        openers = [c for c in range(number) if c == 0 or opens[c]]
        pinned = range(chunk * openers[-1], chunk * openers[-1] + pin_size) if openers else range(0)
        new = list(range(chunk * number, chunk * (number + 1)))
        may_go = sorted(set(frames) - set(range(sink)) - set(pinned))
        frames = sorted(set(frames) - set(may_go[: max(0, len(frames) + chunk - window)]))
        frames = frames + new
        history.append(frames)
    return history


MANY = settings(max_examples=100, deadline=None, derandomize=True)


@MANY
@given(scenarios())
def test_the_frames_held_are_those_of_the_specification(scenario):
    cache = scenario.make_cache()
    expected = [frames_held(scenario.options, list(opens)) for opens in zip(*scenario.shots, strict=True)]
    for number, opens in enumerate(scenario.shots):
        plan = cache.begin_chunk(scenario.options["chunk_size"], opens_shot=opens)
        for row in range(scenario.batch_size):
            assert held(cache, row) == expected[row][number]
            assert len(held(cache, row)) == plan.length == cache.num_cached_frames <= scenario.options["window_size"]


@MANY
@given(scenarios())
def test_storage_holds_those_frames_and_none_is_ever_moved(scenario):
    """Every frame's values are its index: what is read from the storage must be the frames that are held."""
    chunk = scenario.options["chunk_size"]
    cache = scenario.make_cache()
    buffers = (cache[0].key.data_ptr(), cache[0].value.data_ptr())
    where: list[dict[int, int]] = [{} for _ in range(scenario.batch_size)]  # slot of each frame now held
    for number, opens in enumerate(scenario.shots):
        plan = cache.begin_chunk(chunk, opens_shot=opens)
        numbers = torch.arange(chunk * number, chunk * (number + 1)).repeat_interleave(TOKENS)
        states = numbers.float().view(1, -1, 1, 1).expand(scenario.batch_size, -1, HEADS, HEAD_DIM)
        with torch.no_grad():
            for _ in range(2):  # as often as there are steps: a chunk overwrites itself
                keys, values = cache[0].update(states, states, states, plan)
        assert torch.equal(keys, values)
        assert keys.shape == (scenario.batch_size, plan.length * TOKENS, HEADS, HEAD_DIM)
        by_slot = values.unflatten(1, (plan.length, TOKENS))
        assert (by_slot == by_slot[:, :, :1, :1, :1]).all()
        for row in range(scenario.batch_size):
            now = {int(frame): slot for slot, frame in enumerate(by_slot[row, :, 0, 0, 0])}
            assert sorted(now) == held(cache, row)
            assert all(where[row].get(frame, slot) == slot for frame, slot in now.items())
            where[row] = now
    assert (cache[0].key.data_ptr(), cache[0].value.data_ptr()) == buffers


@MANY
@given(scenarios())
def test_relative_keys_are_rotated_to_their_ranks_up_to_a_common_shift(scenario):
    """Attention sees distances alone: its scores must be those of frames numbered 0, 1, 2, ... from the oldest."""
    chunk, batch = scenario.options["chunk_size"], scenario.batch_size
    generator = torch.Generator().manual_seed(0)
    total = chunk * len(scenario.shots)
    shape = (batch, total, TOKENS, HEADS, HEAD_DIM)
    raw_keys, queries = (torch.randn(shape, generator=generator) for _ in range(2))
    numbers = torch.arange(total).float().view(1, total, 1, 1, 1).expand(shape)
    cache = scenario.make_cache(relative_rope=True)
    for number, opens in enumerate(scenario.shots):
        plan = cache.begin_chunk(chunk, opens_shot=opens, rope_offset=3.0)
        own = slice(chunk * number, chunk * (number + 1))
        raw_key, query, value = (states[:, own].flatten(1, 2) for states in (raw_keys, queries, numbers))
        with torch.no_grad():
            keys, values = cache[0].update(apply_rotary(raw_key, plan.rotary), value, raw_key, plan)
        scores = torch.einsum("bqhd,bkhd->bhqk", apply_rotary(query, plan.rotary), keys)
        for row in range(batch):
            frame_of_slot = values[row, ::TOKENS, 0, 0].long()
            rank_of_slot = frame_of_slot.argsort().argsort()
            newest = torch.arange(plan.length - chunk, plan.length)
            ranked_query = apply_rotary(query[row : row + 1], rotary_embedding(newest, HEIGHT, WIDTH, HEAD_DIM))
            ranked_keys = apply_rotary(
                raw_keys[row : row + 1, frame_of_slot].flatten(1, 2),
                rotary_embedding(rank_of_slot, HEIGHT, WIDTH, HEAD_DIM),
            )
            expected = torch.einsum("bqhd,bkhd->bhqk", ranked_query, ranked_keys)
            torch.testing.assert_close(scores[row : row + 1], expected, atol=1e-5, rtol=0)


@MANY
@given(scenarios(), st.booleans())
def test_recaching_in_mid_stream_changes_nothing_but_what_is_written(scenario, relative_rope):
    """Rewritten with the very keys and values that it held, a cache goes on as one that was left alone."""
    chunk, batch = scenario.options["chunk_size"], scenario.batch_size
    generator = torch.Generator().manual_seed(0)
    raw_keys = torch.randn(batch, chunk * len(scenario.shots), TOKENS, HEADS, HEAD_DIM, generator=generator)

    def write(cache: KVCache, frames: list[list[int]]) -> torch.Tensor:
        """Write `frames [B][n]` as the cache's open chunk; returns all keys that it then holds, oldest first."""
        raw = torch.stack([raw_keys[row, indices] for row, indices in enumerate(frames)])
        numbers = torch.tensor(frames).float()[:, :, None, None, None].expand_as(raw)
        raw, numbers = raw.flatten(1, 2), numbers.flatten(1, 2)
        with torch.no_grad():
            keys, values = cache[0].update(apply_rotary(raw, cache.chunk.rotary), numbers, raw, cache.chunk)
        order = values[:, :, 0, 0].argsort(dim=1, stable=True)
        return keys.take_along_dim(order[:, :, None, None], dim=1)

    left_alone, recached = (scenario.make_cache(relative_rope=relative_rope) for _ in range(2))
    for number, opens in enumerate(scenario.shots):
        own = [list(range(chunk * number, chunk * (number + 1)))] * batch
        results = []
        for cache in (left_alone, recached):
            if cache is recached:
                for frames in cache.recache():
                    write(cache, frames)
            cache.begin_chunk(chunk, opens_shot=opens, rope_offset=[2.5 * row for row in range(batch)])
            results.append(write(cache, own))
        assert left_alone.cached_frames(batch - 1) == recached.cached_frames(batch - 1)
        torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=0)


# -- storage ---------------------------------------------------------------------------------------------------------


def random_states(frames: int, batch: int = 1, seed: int = 0, dtype=torch.float32) -> list[torch.Tensor]:
    """Key, value and unrotated key of `frames` frames."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames * TOKENS, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def test_what_attention_reads_is_a_view_of_the_buffer():
    cache = make_cache(num_layers=2, batch_size=2)
    for number in range(6):
        plan = cache.begin_chunk(2)
        for layer in (cache[0], cache[1]):
            with torch.no_grad():
                updated = layer.update(*random_states(2, batch=2, seed=number), plan)
            for states, buffer in zip((*updated, *layer.get(plan.length)), [layer.key, layer.value] * 2, strict=True):
                assert states.shape == (2, plan.length * TOKENS, HEADS, HEAD_DIM)
                assert states._base is buffer._base
                assert states.data_ptr() == buffer.data_ptr()


def test_each_layer_has_its_own_storage():
    cache = make_cache(num_layers=3)
    assert len(cache) == 3
    pointers = {buffer.data_ptr() for i in range(3) for buffer in (cache[i].key, cache[i].value)}
    assert len(pointers) == 6


def test_num_bytes_counts_keys_and_values_and_the_unrotated_keys_of_relative_rope():
    frame = HEADS * TOKENS * HEAD_DIM
    assert make_cache(num_layers=3, batch_size=2, window_size=10).num_bytes == 3 * 2 * 2 * 10 * frame * 4
    assert make_cache(dtype=torch.bfloat16).num_bytes == 2 * 6 * frame * 2
    # sinks, the pin, the frames that are about to become the next pin, and a slot for all the others
    assert make_cache(relative_rope=True).num_bytes == (2 * 6 + 2 + 2 + 2 + 1) * frame * 4
    assert make_cache(relative_rope=True, multi_shot_sink=False).num_bytes == (2 * 6 + 2 + 1) * frame * 4


def test_another_dtype_of_storage_is_converted_when_read():
    cache = make_cache(dtype=torch.bfloat16)
    key, value, raw_key = random_states(2)
    with torch.no_grad():
        cached_key, cached_value = cache[0].update(key, value, raw_key, cache.begin_chunk(2))
    assert cached_key.dtype == cached_value.dtype == torch.float32
    assert torch.equal(cached_key, key.bfloat16().float())
    assert torch.equal(cached_value, value.bfloat16().float())
    assert cache[0].get(2)[0].dtype == torch.bfloat16


def test_with_gradients_attention_reads_copies():
    """The next step overwrites the cache; a backward that comes later needs what was read before."""
    cache = make_cache()
    with torch.no_grad():
        cache[0].update(*random_states(2, seed=1), cache.begin_chunk(2))
    plan = cache.begin_chunk(2)
    for trained in (0, 1):  # the key, the value
        states = random_states(2, seed=2)
        states[trained].requires_grad_()
        read = cache[0].update(*states, plan)[trained]
        before = read.detach().clone()
        with torch.no_grad():
            cache[0].update(*random_states(2, seed=3), plan)
        assert torch.equal(read, before)
        read.sum().backward()
        assert torch.equal(states[trained].grad, torch.ones_like(states[trained]))
    assert not cache[0].key.requires_grad


def test_a_query_alone_can_be_trained():
    """Keys and values that need no gradient are still what the query's gradient is made of."""
    cache = make_cache()
    plan = cache.begin_chunk(2)
    query = random_states(2, seed=1)[0].requires_grad_()
    key, _ = cache[0].update(*random_states(2, seed=2), plan)
    score = (query * key).sum()
    expected = key.clone()
    with torch.no_grad():
        cache[0].update(*random_states(2, seed=3), plan)
    score.backward()
    assert torch.equal(query.grad, expected)


def test_an_endless_relative_stream_does_not_pile_up_rounding():
    """After 2000 chunks in bfloat16, the sinks and the pin are what one fresh rotation makes of them."""
    cache = make_cache(relative_rope=True, dtype=torch.bfloat16)
    raw_keys = {}
    for number in range(2000):
        plan = cache.begin_chunk(2, opens_shot=number == 3)
        _, value, raw_key = random_states(2, seed=number % 100, dtype=torch.bfloat16)
        with torch.no_grad():
            keys, _ = cache[0].update(apply_rotary(raw_key, plan.rotary), value, raw_key, plan)
        raw_keys |= zip((2 * number, 2 * number + 1), raw_key.split(TOKENS, dim=1), strict=True)
        raw_keys = {frame: raw_keys[frame] for frame in held(cache)}
    assert held(cache) == [0, 1, 6, 7, 3998, 3999]
    assert positions(cache) == [3994.0, 3995.0, 3996.0, 3997.0, 3998.0, 3999.0]
    by_slot = dict(zip((frame.index for frame in cache._samples[0].slots), keys.split(TOKENS, dim=1), strict=True))
    for frame, position in zip(held(cache), positions(cache), strict=True):
        rotary = rotary_embedding(torch.tensor([position], dtype=torch.float64), HEIGHT, WIDTH, HEAD_DIM)
        assert torch.equal(by_slot[frame], apply_rotary(raw_keys[frame], rotary))


# -- recache ---------------------------------------------------------------------------------------------------------


def test_recache_goes_through_the_cached_frames_oldest_first():
    cache = make_cache()
    for opens_shot in (False, False, True, False, False):
        cache.begin_chunk(2, opens_shot=opens_shot)
    assert held(cache) == [0, 1, 4, 5, 8, 9]
    steps = [(frames, cache.chunk.num_frames, cache.chunk.length) for frames in cache.recache()]
    assert steps == [([[0, 1]], 2, 2), ([[4, 5]], 2, 4), ([[8, 9]], 2, 6)]


def test_recache_keeps_positions_and_rewrites_slots_in_order():
    cache = make_cache()
    for number in range(5):
        cache.begin_chunk(2, opens_shot=number == 2, rope_offset=8.0 if number >= 2 else 0.0)
    before = cache.cached_frames()
    assert [frame.position for frame in before] == [0.0, 1.0, 12.0, 13.0, 16.0, 17.0]
    seen = []
    for frames in cache.recache():
        rotary = rotary_embedding(torch.tensor([before[held(cache).index(i)].position for i in frames[0]]), 1, 2, 12)
        assert torch.equal(cache.chunk.rotary, rotary)
        seen += cache.chunk.slots[0].tolist()
    assert seen == [0, 1, 2, 3, 4, 5]
    assert cache.cached_frames() == before


def test_recache_gives_each_row_its_own_frames():
    cache = make_cache(batch_size=2)
    for opens_shot in ([False, False], [True, False], [False, True], [False, False], [False, False]):
        cache.begin_chunk(2, opens_shot=opens_shot)
    assert list(cache.recache()) == [[[0, 1], [0, 1]], [[2, 3], [4, 5]], [[8, 9], [8, 9]]]


def test_recache_splits_at_the_borders_of_chunks():
    """A chunk of which a part is left is rewritten by itself; no step is longer than a chunk."""
    cache = make_cache(sink_size=3, multi_shot_sink=False)
    for _ in range(4):
        cache.begin_chunk(2)
    assert held(cache) == [0, 1, 2, 5, 6, 7]
    assert list(cache.recache()) == [[[0, 1]], [[2]], [[5]], [[6, 7]]]


def test_recache_splits_where_a_chunk_of_any_row_ends():
    cache = make_cache(batch_size=2, window_size=7)
    for opens_shot in (False, [False, True], False, False):
        cache.begin_chunk(2, opens_shot=opens_shot)
    assert (held(cache, 0), held(cache, 1)) == ([0, 1, 3, 4, 5, 6, 7], [0, 1, 2, 3, 5, 6, 7])
    groups = [[[0, 1], [0, 1]], [[3], [2]], [[4], [3]], [[5], [5]], [[6, 7], [6, 7]]]
    assert list(cache.recache()) == groups


@pytest.mark.parametrize("relative_rope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "fp8"], ids=str)
@pytest.mark.parametrize("rewritten", [[True, False], [False, True], [False, False]], ids=str)
def test_recache_leaves_other_rows_as_they_are(dtype, relative_rope, rewritten):
    """Frames, slots, keys, values, and what is rotated again later; while the chosen rows are rewritten."""
    cache, untouched = (make_cache(batch_size=2, dtype=dtype, relative_rope=relative_rope) for _ in range(2))
    forwards = 0

    def forward(kv_cache: KVCache, seed: int) -> None:
        key, value, raw = random_states(2, batch=2, seed=seed)
        kv_cache.finish_chunk()
        kv_cache[0].load()
        with torch.no_grad():
            kv_cache[0].attend(key, key, value, raw, kv_cache.chunk, None)
        kv_cache[0].store(kv_cache.chunk)

    for number, opens in enumerate(([True, True], [True, False], [False, True], [False, False], [False, True])):
        if number == 4:
            for frames in cache.recache(rewritten):
                assert [len(own) for own in frames] == [2, 2]
                forward(cache, seed=100 + forwards)
                forwards += 1
        for kv_cache in (cache, untouched):
            kv_cache.begin_chunk(2, opens_shot=opens, rope_offset=[0.0, 5.0])
            forward(kv_cache, seed=number)
    assert forwards == 3
    for row, was_rewritten in enumerate(rewritten):
        same = [torch.equal(*(c[0].get(6)[part][row] for c in (cache, untouched))) for part in (0, 1)]
        assert same == [not was_rewritten] * 2
        if not was_rewritten:
            assert cache._samples[row] == untouched._samples[row]


def test_recache_needs_to_know_of_each_row():
    with pytest.raises(ValueError, match="`rewritten` has 1 value for a batch of 2"):
        list(make_cache(batch_size=2).recache([True]))


def test_recache_before_anything_is_cached_does_nothing():
    assert list(make_cache().recache()) == []


def test_eviction_goes_on_after_a_recache_as_before():
    cache = make_cache()
    for opens_shot in (False, False, True, False):
        cache.begin_chunk(2, opens_shot=opens_shot)
    assert len(list(cache.recache())) == 3
    cache.begin_chunk(2)
    assert held(cache) == [0, 1, 4, 5, 8, 9]


# -- text ------------------------------------------------------------------------------------------------------------


def test_text_is_known_by_the_tensor_it_came_from():
    cache, text = make_cache(num_layers=2), torch.zeros(1, 4, 8)
    assert not cache.has_text(text)
    cache.cache_text(text)
    assert cache.has_text(text)
    assert not cache.has_text(text.clone()), "equal, but another tensor"
    text += 1
    assert not cache.has_text(text), "changed in place"


def test_recache_and_reset_forget_the_text():
    text = torch.zeros(1, 4, 8)
    for forget in (lambda cache: list(cache.recache()), KVCache.reset, KVCache.clear_text):
        cache = make_cache(num_layers=2)
        cache.cache_text(text)
        cache[0].text = cache[1].text = (text, text)
        forget(cache)
        assert not cache.has_text(text)
        assert cache[0].text is None and cache[1].text is None


# -- life ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative_rope", [False, True])
def test_after_a_reset_the_next_video_begins_in_the_same_memory(relative_rope):
    cache = make_cache(relative_rope=relative_rope)
    buffers = [buffer.data_ptr() for buffer in (cache[0].key, cache[0].value)]
    for number in range(5):
        cache.begin_chunk(2, opens_shot=number == 3)
    cache.reset()
    assert (cache.num_cached_frames, cache.num_frames_seen, held(cache)) == (0, 0, [])
    with pytest.raises(ValueError, match="No chunk is open"):
        _ = cache.chunk
    cache.begin_chunk(2)
    assert cache.cached_frames() == [CachedFrame(0, 0.0), CachedFrame(1, 1.0)]
    assert [buffer.data_ptr() for buffer in (cache[0].key, cache[0].value)] == buffers


def test_a_forward_without_an_open_chunk_says_what_to_call():
    with pytest.raises(ValueError, match=r"call `begin_chunk\(num_frames\)` before"):
        _ = make_cache().chunk


@pytest.mark.parametrize("num_frames", [0, -1, 3, 1.0, True, "2"])
def test_a_chunk_has_at_least_one_frame_and_at_most_chunk_size(num_frames):
    cache = make_cache()
    with pytest.raises(ValueError, match=f"`num_frames` must be an integer from 1 to 2, got {num_frames!r}"):
        cache.begin_chunk(num_frames)
    assert cache.num_frames_seen == 0, "nothing was begun"


@pytest.mark.parametrize("name", ["opens_shot", "rope_offset"])
def test_values_for_each_row_must_be_as_many_as_rows(name):
    cache = make_cache(batch_size=2)
    with pytest.raises(ValueError, match=f"`{name}` has 3 values for a batch of 2"):
        cache.begin_chunk(2, **{name: [0, 1, 0]})
    assert cache.num_frames_seen == 0


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"window_size": 5}, "`window_size` 5 is too small: 2 sink frames, 2 .* chunk of 2 need 6"),
        ({"window_size": 3, "multi_shot_sink": False}, "2 sink frames, 0 .* need 4"),
        ({"window_size": 1, "sink_size": 0}, "0 sink frames, 0 .* need 2"),
        ({"sink_size": 3, "window_size": 20}, r"multiple of `chunk_size` \(2\), got 3"),
        ({"sink_size": -1, "multi_shot_sink": False}, "at least 0, got 2, 6 and -1"),
        ({"chunk_size": 0}, "at least 1 .* got 0, 6 and 2"),
        ({"window_size": 0}, "at least 1 .* got 2, 0 and 2"),
    ],
)
def test_sizes_that_leave_no_room_raise_and_state_the_numbers(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_cache(**sizes)


@torch.no_grad()
@pytest.mark.parametrize("failing", [0, 1])
def test_after_an_error_in_the_middle_of_a_forward_the_text_is_computed_again(failing):
    model, inputs = tiny_transformer(), random_inputs(frames=2)
    cache = tiny_cache(model)
    cache.begin_chunk(2)
    expected = model(**inputs, kv_cache=cache).sample
    cache = tiny_cache(model)
    cache.begin_chunk(2)

    def out_of_memory(*_):
        hook.remove()
        raise torch.OutOfMemoryError("no memory is left")

    hook = model.blocks[failing].register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model(**inputs, kv_cache=cache)
    assert not cache.has_text(inputs["encoder_hidden_states"])
    assert torch.equal(model(**inputs, kv_cache=cache).sample, expected)
    assert cache.has_text(inputs["encoder_hidden_states"])
