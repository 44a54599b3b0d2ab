"""Gradients through a roll-out in the KV cache, as distillation needs them: for each chunk one forward with gradients,
before and after it forwards without, all in one cache, and a single backward long after its slots were overwritten."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

from longlive_diffusers import KVCache, LongLiveTransformer3DModel
from longlive_diffusers.models.activation_offloading import checkpoint_on_host
from longlive_diffusers.models.cache_journal import Moment, Overwritten
from longlive_diffusers.models.chunk_history import ChunkHistory
from longlive_diffusers.nvfp4 import NVFP4Config, quantize_model
from tests.support.nvfp4_models import small_transformer
from tests.support.storage_watch import StorageWatch
from tests.support.tiny_pipeline import CHANNELS, CHUNK_SIZE, SIDE, TEXT_DIM, TEXT_LENGTH


BATCH, NUM_CHUNKS = 2, 6
LAYERS, WIDTH, TOKENS, FLOAT32 = 2, 32, 4, 4  # of `small_transformer`; tokens of a frame
CUTS = {2: [True, False], 3: [False, True], 4: [True, True]}  # chunks that open a shot, in either row


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(seed: int, frames: int = CHUNK_SIZE, batch: int = BATCH) -> torch.Tensor:
    return random(batch, CHANNELS, frames, SIDE, SIDE, seed=seed)


@dataclass
class RollOut:
    """A roll-out of `NUM_CHUNKS` chunks of two rows with different shots.

    Args:
        model: The network; its dtype is that of the latents.
        cache: Options of its cache.
        recache_at: The chunk after which the history is rewritten for another prompt, or None.
        first_graded: The first chunk whose exit step carries gradients.
    """

    model: LongLiveTransformer3DModel
    cache: dict = field(default_factory=dict)
    recache_at: int | None = None
    first_graded: int = 0

    def new_cache(self) -> KVCache:
        options = {"window_size": 6, "sink_size": 2, "multi_shot_sink": True, **self.cache}
        return self.model.create_kv_cache(BATCH, SIDE, SIDE, **options)

    def forward(self, states: torch.Tensor, timestep: float, cache: KVCache, prompt: int = 0) -> torch.Tensor:
        text = random(BATCH, TEXT_LENGTH, TEXT_DIM, seed=1000 + prompt).to(self.model.dtype)
        return self.model(states.to(self.model.dtype), torch.full((BATCH,), timestep), text, kv_cache=cache).sample

    def run(
        self,
        cache: KVCache,
        exit_step: Callable[[Callable[[KVCache], torch.Tensor], KVCache], torch.Tensor] = lambda run, cache: run(
            cache
        ),
    ) -> list[torch.Tensor]:
        """The outputs of the exit steps, which carry gradients; `exit_step` runs one on the cache, or on another."""
        outputs, prompt = [], 0
        video = torch.zeros(BATCH, CHANNELS, NUM_CHUNKS * CHUNK_SIZE, SIDE, SIDE)
        for number in range(NUM_CHUNKS):
            cache.begin_chunk(CHUNK_SIZE, opens_shot=CUTS.get(number, False), rope_offset=[0.0, 8.0 * (number > 2)])
            with torch.no_grad():
                self.forward(latents(number), 900.0, cache, prompt)
            noisy = latents(100 + number)
            if number < self.first_graded:
                with torch.no_grad():
                    output = self.forward(noisy, 500.0, cache, prompt)
            else:
                output = exit_step(partial(self.forward, noisy, 500.0, prompt=prompt), cache)
            if output.requires_grad:
                outputs.append(output)
            own = slice(number * CHUNK_SIZE, (number + 1) * CHUNK_SIZE)
            video[:, :, own] = output.detach().float()
            cache.finish_chunk()
            with torch.no_grad():
                self.forward(video[:, :, own], 0.0, cache, prompt)
                if number == self.recache_at:
                    prompt = 1
                    for frames in cache.recache():
                        rows = [video[row, :, indices] for row, indices in enumerate(frames)]
                        self.forward(torch.stack(rows), 0.0, cache, prompt)
        return outputs

    def gradients(self, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of a weighted sum of all outputs, by one backward."""
        self.model.zero_grad()
        weights = [random(*output.shape, seed=200 + number) for number, output in enumerate(outputs)]
        sum((output.float() * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def plain_model() -> LongLiveTransformer3DModel:
    return small_transformer()


def lora_model() -> LongLiveTransformer3DModel:
    model = small_transformer().requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "net.2"], init_lora_weights=False))
    return model


def fused_model() -> LongLiveTransformer3DModel:
    model = small_transformer()
    model.fuse_qkv_projections()
    return model


def nvfp4_lora_model() -> LongLiveTransformer3DModel:
    model = quantize_model(small_transformer(), NVFP4Config()).requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    return model


ROLL_OUTS = {
    "relative RoPE": lambda: RollOut(plain_model(), {"relative_rope": True}),
    "recache": lambda: RollOut(plain_model(), recache_at=3),
    "odd window, no pins": lambda: RollOut(
        plain_model(), {"window_size": 7, "sink_size": 3, "multi_shot_sink": False, "relative_rope": True}
    ),
    "whole video": lambda: RollOut(plain_model(), {"window_size": 12, "num_frames": 12}, recache_at=3),
    "last chunks alone": lambda: RollOut(plain_model(), {"relative_rope": True}, first_graded=3),
    "bfloat16": lambda: RollOut(plain_model().bfloat16(), {"relative_rope": True}),
    "nvfp4": lambda: RollOut(plain_model(), {"dtype": "nvfp4"}, recache_at=3),
    "nvfp4, relative RoPE": lambda: RollOut(plain_model(), {"dtype": "nvfp4", "relative_rope": True}),
    "fp8, relative RoPE, recache": lambda: RollOut(
        plain_model(), {"dtype": "fp8", "relative_rope": True}, recache_at=3
    ),
    "LoRA": lambda: RollOut(lora_model(), {"relative_rope": True}, recache_at=3),
    "fused projections": lambda: RollOut(fused_model()),
    "LoRA on NVFP4, packed cache": lambda: RollOut(nvfp4_lora_model(), {"dtype": "nvfp4"}, first_graded=3),
}
every_roll_out = pytest.mark.parametrize("make", ROLL_OUTS.values(), ids=ROLL_OUTS)


def on_copied_windows(forward: Callable[[KVCache], torch.Tensor], cache: KVCache) -> torch.Tensor:
    """The slow reference: the exit step runs on a cache of its own, which nothing overwrites, and attention reads
    copies of its window, which the graph keeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "histories", lambda cache: [cache[layer] for layer in range(len(cache))])
        return forward(copy.deepcopy(cache))


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert gradient.isfinite().all(), name
        assert torch.equal(found[name], gradient), name


# -- gradients -------------------------------------------------------------------------------------------------------


@every_roll_out
def test_gradients_are_those_of_copied_windows_bit_for_bit(make):
    """Also when, before the backward, the cache has gone on to another video or is gone; the kernels read the same
    numbers in the same order, so that there is nothing to tolerate."""
    roll_out = make()
    reference = roll_out.run(roll_out.new_cache(), on_copied_windows)
    expected = roll_out.gradients(reference)

    cache = roll_out.new_cache()
    outputs = roll_out.run(cache)
    assert all(torch.equal(*pair) for pair in zip(outputs, reference, strict=True))
    cache.reset()
    with torch.no_grad():
        for seed in range(4):
            cache.begin_chunk(CHUNK_SIZE)
            cache.finish_chunk()
            roll_out.forward(latents(300 + seed), 0.0, cache)
    del cache
    assert_same_bits(roll_out.gradients(outputs), expected)

    roll_out.model.enable_gradient_checkpointing()
    cache = roll_out.new_cache()
    outputs = roll_out.run(cache)
    assert all(torch.equal(*pair) for pair in zip(outputs, reference, strict=True))
    before = contents(cache)
    assert_same_bits(roll_out.gradients(outputs), expected)
    assert all(torch.equal(*pair) for pair in zip(contents(cache), before, strict=True)), "recomputing writes nothing"


def buffers(cache: KVCache) -> list[torch.Tensor]:
    """Everything that a cache stores."""
    found = []
    for layer in cache:
        for stored in (layer.key, layer.value, layer.raw_key):
            parts = vars(stored).values() if hasattr(stored, "read_into") else [stored]
            found += [part for part in parts if isinstance(part, torch.Tensor)]
    return found


def contents(cache: KVCache) -> list[torch.Tensor]:
    """Copies of everything that a cache stores."""
    return [buffer.clone() for buffer in buffers(cache)]


def watch_memory(roll_out: RollOut, cache: KVCache) -> StorageWatch:
    """Watch all memory but that of weights and of the cache."""
    shared = [cache[0].visible[0], cache[0].visible[1]] if cache.is_packed else []
    return StorageWatch(ignored=[*roll_out.model.parameters(), *buffers(cache), *shared])


def on_a_cache_left_alone(forward: Callable[[KVCache], torch.Tensor], cache: KVCache) -> torch.Tensor:
    """As [`on_copied_windows`], but the window is read as it is read now."""
    return forward(copy.deepcopy(cache))


MIXED = {
    "bfloat16 cache": lambda: RollOut(plain_model(), {"dtype": torch.bfloat16, "relative_rope": True}, recache_at=3),
    "float16 cache": lambda: RollOut(plain_model(), {"dtype": torch.float16}),
    "float32 cache of a bfloat16 model": lambda: RollOut(plain_model().bfloat16(), {"dtype": torch.float32}),
}


@pytest.mark.parametrize("make", MIXED.values(), ids=MIXED)
def test_gradients_through_a_cache_of_another_dtype(make):
    """There, keys and values are rounded as the cache rounds them, which copied windows did not do for the chunk's
    own; what was overwritten must still not be seen."""
    roll_out = make()
    expected = roll_out.gradients(roll_out.run(roll_out.new_cache(), on_a_cache_left_alone))
    assert_same_bits(roll_out.gradients(roll_out.run(roll_out.new_cache())), expected)


def test_the_gradient_passes_the_rounding_of_the_cache_unrounded():
    """A first chunk sees nothing but itself: with values that bfloat16 has, it cannot tell the two caches apart."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        cache = plain_model().create_kv_cache(
            1, SIDE, SIDE, window_size=6, sink_size=2, multi_shot_sink=True, dtype=dtype
        )
        chunk = cache.begin_chunk(CHUNK_SIZE)
        states = [random(1, CHUNK_SIZE * TOKENS, 2, 16, seed=seed).bfloat16().float() for seed in range(3)]
        leaves = [tensor.requires_grad_() for tensor in states]
        query, key, value = leaves
        history = cache.histories()[0]
        attended = history.run(history.attend, query, key, value, key, chunk, None)
        attended.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@every_roll_out
def test_a_forward_with_gradients_computes_and_writes_what_one_without_does(make):
    roll_out = make()
    # In bfloat16 on a CPU, attention without gradients is another one (see `attend`), unless one is asked for.
    backend = "_native_math" if roll_out.model.dtype == torch.bfloat16 else "native"

    def without_gradients(forward, cache):
        with torch.no_grad():
            results.append(forward(cache))
        return results[-1]

    results, caches = [], [roll_out.new_cache() for _ in range(2)]
    with attention_backend(backend):
        roll_out.run(caches[0], without_gradients)
        outputs = roll_out.run(caches[1])
    assert all(torch.equal(*pair) for pair in zip(outputs, results, strict=True))
    assert all(torch.equal(*pair) for pair in zip(*map(contents, caches), strict=True))


# -- gradient checkpointing ------------------------------------------------------------------------------------------


def reentrant(run, *arguments):
    return checkpoint(run, *arguments, use_reentrant=True)


def to_the_end(run, *arguments):
    return checkpoint(run, *arguments, use_reentrant=False, early_stop=False)


@pytest.mark.parametrize(
    "function", [reentrant, to_the_end, checkpoint_on_host, lambda run, *arguments: run(*arguments)]
)
@pytest.mark.parametrize("dtype", [None, "nvfp4"])
def test_checkpointing_functions_of_the_callers_own(function, dtype):
    roll_out = RollOut(plain_model(), {"relative_rope": True, "dtype": dtype})
    expected = roll_out.gradients(roll_out.run(roll_out.new_cache()))
    roll_out.model.enable_gradient_checkpointing(function)
    cache = roll_out.new_cache()
    outputs = roll_out.run(cache)
    before = contents(cache)
    found = roll_out.gradients(outputs)
    for name, gradient in expected.items():  # of what all blocks share, these functions sum in another order
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(contents(cache), before, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_can_be_run_twice(checkpointing):
    roll_out = RollOut(plain_model(), {"relative_rope": True})
    if checkpointing:
        roll_out.model.enable_gradient_checkpointing()
    loss = sum(output.square().sum() for output in roll_out.run(roll_out.new_cache()))
    weight = roll_out.model.blocks[1].attn1.to_k.weight
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    roll_out.model.zero_grad()
    loss.backward()
    assert first.any() and torch.equal(weight.grad, first)


# -- memory ----------------------------------------------------------------------------------------------------------


def held_for_backward(window: int, checkpointing: bool, dtype=None, patched: bool = False) -> int:
    """Bytes that live from a forward in a full window to its backward, whoever holds them."""
    roll_out = RollOut(plain_model(), {"window_size": window, "dtype": dtype})
    cache = roll_out.new_cache()
    with torch.no_grad():
        for seed in range(window // CHUNK_SIZE + 1):
            cache.begin_chunk(CHUNK_SIZE)
            cache.finish_chunk()
            roll_out.forward(latents(seed), 0.0, cache)
    cache.begin_chunk(CHUNK_SIZE)
    if checkpointing:
        roll_out.model.enable_gradient_checkpointing()
    watch = watch_memory(roll_out, cache)
    with pytest.MonkeyPatch.context() as patch:
        if patched:
            patch.setattr(KVCache, "histories", lambda cache: [cache[layer] for layer in range(len(cache))])
        with watch:
            output = roll_out.forward(latents(100), 500.0, cache)
    assert output.requires_grad
    return watch.alive_bytes()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "nvfp4", "fp8", "fp8_attention"])
def test_what_a_forward_keeps_does_not_grow_with_the_window(dtype):
    """Neither with gradient checkpointing nor without, and with it less than half of that."""
    without, checkpointed = (held_for_backward(60, checkpointing, dtype) for checkpointing in (False, True))
    assert held_for_backward(6, False, dtype) == without
    assert held_for_backward(6, True, dtype) == checkpointed
    assert checkpointed < 0.5 * without


def test_measuring_what_is_kept_notices_copied_windows():
    """One for keys and one for values."""
    growth = held_for_backward(60, False, patched=True) - held_for_backward(6, False, patched=True)
    assert growth == BATCH * LAYERS * 2 * 54 * TOKENS * WIDTH * FLOAT32


FRAME = BATCH * LAYERS * TOKENS * WIDTH * FLOAT32  # keys of all rows and layers
PER_CHUNK = {
    "evicted": ({}, 2 * 2),
    "evicted, and rotated sinks and pins": ({"relative_rope": True}, 2 * 2 + 2 + 2),
    "nothing": ({"window_size": 12, "num_frames": 12}, 0),
}


@pytest.mark.parametrize(("settings", "frames"), PER_CHUNK.values(), ids=PER_CHUNK)
def test_a_roll_out_keeps_each_frame_that_was_overwritten_once(settings, frames):
    """Of a chunk, keys and values of the frames that it evicts, although the forwards of several chunks saw them; with
    relative RoPE also the keys of two sinks and two pinned frames, which are rotated again."""
    roll_out = RollOut(plain_model(), {"window_size": 10, **settings})
    cache, outputs, kept = roll_out.new_cache(), [], []
    with watch_memory(roll_out, cache) as watch:
        for number in range(12 if frames else NUM_CHUNKS):
            cache.begin_chunk(CHUNK_SIZE, opens_shot=number == 1)
            outputs.append(roll_out.forward(latents(number), 500.0, cache))
            kept.append(watch.alive_bytes())
    first, second, *_, before, last = kept
    index_bytes = 512  # of samples and slots
    assert 0 <= last - before - (second - first + frames * FRAME) < index_bytes < FRAME


def test_what_nobody_will_ask_for_is_not_kept():
    """A forward whose graph is kept, and a long stream after it: what the forward saw is kept, and nothing later."""
    roll_out = RollOut(plain_model(), {"relative_rope": True})
    cache = roll_out.new_cache()
    with torch.no_grad():
        for seed in range(4):
            cache.begin_chunk(CHUNK_SIZE)
            roll_out.forward(latents(seed), 0.0, cache)
    cache.begin_chunk(CHUNK_SIZE)
    output, kept = roll_out.forward(latents(4), 500.0, cache), []
    with torch.no_grad(), watch_memory(roll_out, cache) as watch:
        for seed in range(5, 15):
            cache.begin_chunk(CHUNK_SIZE)
            roll_out.forward(latents(seed), 0.0, cache)
            kept.append(watch.alive_bytes())
    assert output.requires_grad
    assert len(set(kept[3:])) == 1
    assert kept[-1] - kept[0] <= 6 * 2 * FRAME, "at most the window"


REMEMBERING = (ChunkHistory, Moment, Overwritten)


@pytest.fixture
def remembering():
    """The types of what remembers histories, of everything that is alive and was not when the test began."""
    gc.collect()
    earlier = {id(thing): thing for thing in gc.get_objects() if type(thing) in REMEMBERING}
    gc.disable()  # what a garbage collection would find must not be there
    yield lambda: [
        type(thing) for thing in gc.get_objects() if type(thing) in REMEMBERING and id(thing) not in earlier
    ]
    gc.enable()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_remembered_when_the_graph_is_gone(checkpointing, remembering):
    """At once, without a garbage collection: nothing refers to itself in a circle."""
    roll_out = RollOut(plain_model(), {"relative_rope": True})
    if checkpointing:
        roll_out.model.enable_gradient_checkpointing()
    cache = roll_out.new_cache()
    outputs = roll_out.run(cache)
    assert remembering().count(ChunkHistory) == NUM_CHUNKS * LAYERS and Overwritten in remembering()
    roll_out.gradients(outputs)
    assert not remembering(), "the outputs are there, but their backward is done"

    cache.reset()
    outputs, layer = roll_out.run(cache), weakref.ref(cache[0])
    del cache
    assert layer() is not None and remembering(), "a backward may still come"
    del outputs
    assert layer() is None and not remembering()


def test_a_stream_without_gradients_remembers_nothing(remembering):
    roll_out = RollOut(plain_model(), {"relative_rope": True})
    cache = roll_out.new_cache()
    with torch.no_grad():
        assert not roll_out.run(cache)
    assert not remembering()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_remembers_nothing_of_it(clone):
    """What is overwritten in the copy is not what was overwritten in the cache."""
    roll_out = RollOut(plain_model(), {"relative_rope": True})
    expected = roll_out.gradients(roll_out.run(roll_out.new_cache()))
    cache = roll_out.new_cache()
    outputs = roll_out.run(cache)
    other = clone(cache)
    with torch.no_grad():
        for seed in range(4):
            other.begin_chunk(CHUNK_SIZE, opens_shot=seed == 0)
            roll_out.forward(latents(400 + seed), 0.0, other)
    assert_same_bits(roll_out.gradients(outputs), expected)
