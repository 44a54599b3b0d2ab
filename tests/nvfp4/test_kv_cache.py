"""The KV cache in NVFP4 and FP8: what it keeps, what it costs, and that attention hardly notices."""

import pytest
import torch
from torch.nn import functional as F

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.models.frame_store import FRAME_STORES, FP8Frames, NVFP4Frames
from longlive_diffusers.models.layer_kv_cache import allocate_slots
from longlive_diffusers.models.rotary import apply_rotary, rotary_embedding
from longlive_diffusers.nvfp4.operators import write_fp8_frames
from tests.support.checks import default_dtype
from tests.support.nvfp4_models import small_pipeline, small_transformer
from tests.support.tiny_pipeline import tiny_arguments


PACKED = ("nvfp4", "fp8")
IN_FEW_BITS = (*PACKED, "fp8_attention")
CPU = torch.device("cpu")


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def stored(store, states: torch.Tensor) -> torch.Tensor:
    """`[B, heads, slots, tokens, dim]`, written frame by frame and read."""
    rows = torch.arange(states.shape[0])[:, None]
    for slot in range(states.shape[2]):
        store.write(rows, torch.full_like(rows, slot), states[:, :, slot : slot + 1].transpose(1, 2))
    target = torch.full(states.shape, torch.nan, dtype=states.dtype)
    store.read_into(target)
    return target


# ------------------------------------------------------------------------------------------------------------ storage
@pytest.mark.parametrize("bias", [0.0, 2.0])
@pytest.mark.parametrize("outliers", [False, True])
def test_attention_over_four_bits(bias, outliers):
    """Keys with offsets or large channels cost no accuracy, as their mean is kept apart."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, 1, 1024, 128)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    key = key + bias * torch.randn(4, 1, 1, 128, generator=generator)
    if outliers:
        key[..., :4] += 10
    packed_key = stored(NVFP4Frames(shape, CPU, for_keys=True), key)
    packed_value = stored(NVFP4Frames(shape, CPU, for_keys=False), value)
    exact = F.scaled_dot_product_attention(query[:, :, 0], key[:, :, 0], value[:, :, 0])
    result = F.scaled_dot_product_attention(query[:, :, 0], packed_key[:, :, 0], packed_value[:, :, 0])
    assert relative(result, exact) < 0.13
    uncentered = stored(NVFP4Frames(shape, CPU, for_keys=False), key)
    without = F.scaled_dot_product_attention(query[:, :, 0], uncentered[:, :, 0], packed_value[:, :, 0])
    if bias or outliers:
        assert relative(without, exact) > 1.4 * relative(result, exact)


@pytest.mark.parametrize(
    ("make", "gate"),
    [
        (lambda shape: NVFP4Frames(shape, CPU, for_keys=True), 0.0885),
        (lambda shape: NVFP4Frames(shape, CPU, for_keys=True, scale_rule="static_6"), 0.0965),
        (lambda shape: FP8Frames(shape, CPU, for_keys=True), 0.03),
    ],
)
def test_a_frame_is_read_as_it_was_written_and_alone(make, gate):
    shape = (2, 3, 4, 64, 32)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    states[:, :, 2] *= 1000  # one frame's scale is no other's
    store = make(shape)
    first = stored(store, states)
    assert relative(first[:, :, :2], states[:, :, :2]) < gate
    store.write(torch.tensor([[1]]), torch.tensor([[2]]), torch.zeros(1, 1, 3, 64, 32))
    target = torch.full(shape, torch.nan)
    store.read_into(target[:, :, :3])
    assert torch.equal(target[1, :, 2], torch.zeros(3, 64, 32))
    assert torch.equal(target[0, :, :3], first[0, :, :3]) and torch.equal(target[1, :, :2], first[1, :, :2])
    assert target[:, :, 3].isnan().all()  # what is not filled is not read


@pytest.mark.parametrize("for_keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("store", FRAME_STORES.values(), ids=FRAME_STORES)
def test_frames_of_a_window_are_written_to_the_slots_they_stand_in(store, for_keys):
    shape = (2, 3, 4, 5, 16)
    window = allocate_slots(shape, torch.float32, CPU)
    window.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    one_by_one, found = (store(shape, CPU, for_keys=for_keys) for _ in range(2))
    chosen = [[3, 0], [1, 2]]
    for sample, slots in enumerate(chosen):
        for slot in slots:
            one_by_one.write(torch.tensor([sample]), torch.tensor([slot]), window[sample, :, slot][None])
    found.write_from(window, torch.tensor(chosen))
    assert all(torch.equal(part, own) for part, own in zip(found.parts, one_by_one.parts, strict=True))
    assert not found.codes[0, :, 1:3].any() and found.codes[0, :, 3].any()


def test_windows_that_kernels_cannot_write_from_are_refused():
    """Before anything is launched."""
    shape = (2, 3, 4, 5, 16)
    store, window, chosen = FP8Frames(shape, CPU, for_keys=True), torch.zeros(shape), torch.tensor([[3, 0], [1, 2]])
    for wrong in (window[:1], window.transpose(3, 4), window[..., ::2], torch.zeros(2, 3, 5, 5, 16)):
        with pytest.raises(ValueError, match=r"A window on a cache .* has 1 to 4 of its slots, contiguous for each"):
            write_fp8_frames(wrong, chosen, *store.parts)
    for wrong in (chosen[0], chosen[:1], chosen.int(), chosen.T):
        with pytest.raises(ValueError, match=r"The chosen slots are int64 \[2, n\], contiguous; got "):
            write_fp8_frames(window, wrong, *store.parts)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiples of 16, this network's is 24"):
        NVFP4Frames((1, 1, 1, 4, 24), CPU, for_keys=True)


# -------------------------------------------------------------------------------------------------------- generation
CASES = {
    "a window that is full": {"num_frames": 61},
    "relative RoPE": {"num_frames": 61, "relative_rope": True},
    "guidance": {"guidance_scale": 3.0, "negative_prompt": "dog"},
    "a batch": {"prompt": ["a cat", "a dog on the grass"], "generator": None, "num_frames": 45},
    "shots": {"prompt": None, "shot_prompts": ["a cat", "a dog"], "chunks_per_shot": [3, 3], "num_frames": 45},
    "no sinks": {"sink_size": 0, "num_frames": 61},
}


def generate(pipe, **arguments):
    torch.manual_seed(0)
    return pipe(**tiny_arguments(**arguments)).frames


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_videos_hardly_change(arguments):
    pipe = small_pipeline()
    exact = generate(pipe, **arguments)
    errors = {kind: relative(generate(pipe, **arguments, kv_cache_dtype=kind), exact) for kind in IN_FEW_BITS}
    assert 0 < errors["fp8"] < errors["nvfp4"] < 0.02, errors
    assert errors["fp8"] < errors["fp8_attention"] < 0.02, errors


@pytest.mark.parametrize("kind", PACKED)
def test_the_first_chunk_is_exact(kind):
    """It attends to itself alone, and a chunk is not rounded while it is denoised."""
    pipe = small_pipeline()
    exact, packed = generate(pipe, num_frames=13), generate(pipe, num_frames=13, kv_cache_dtype=kind)
    assert torch.equal(packed[:, :, :2], exact[:, :, :2])
    assert not torch.equal(packed[:, :, 2:], exact[:, :, 2:])


@pytest.mark.parametrize("kind", IN_FEW_BITS)
def test_a_prompt_switch_rewrites_what_is_cached(kind):
    pipe = small_pipeline()

    def run(dtype):
        with pipe.stream(**tiny_arguments(num_frames=37, kv_cache_dtype=dtype)) as session:
            chunks = []
            for chunk in session:
                chunks.append(chunk.latents)
                if chunk.index == 2:
                    session.prompt = "a dog sleeps"
            return torch.cat(chunks, dim=2)

    assert 0 < relative(run(kind), run(None)) < 0.02


@pytest.mark.parametrize("kind", IN_FEW_BITS)
def test_interleaved_sessions_do_not_meet_in_the_shared_buffers(kind):
    pipe = small_pipeline()
    alone = [generate(pipe, prompt=prompt, num_frames=29, kv_cache_dtype=kind) for prompt in ("a cat", "a dog")]
    sessions = [
        pipe.stream(**tiny_arguments(prompt=prompt, num_frames=29, kv_cache_dtype=kind))
        for prompt in ("a cat", "a dog")
    ]
    both = list(zip(*sessions, strict=True))
    for row, expected in enumerate(alone):
        assert torch.equal(torch.cat([chunks[row].latents for chunks in both], dim=2), expected)


@pytest.mark.parametrize("kind", IN_FEW_BITS)
def test_gradients_pass_through_the_chunk_itself(kind):
    model = small_transformer()
    cache = model.create_kv_cache(1, 4, 4, window_size=6, sink_size=2, multi_shot_sink=True, dtype=kind)
    text = torch.randn(1, 8, 16)
    for finished in (False, True):
        cache.begin_chunk(2) if not finished else cache.finish_chunk()
        with torch.no_grad():
            model(torch.randn(1, 8, 2, 4, 4), torch.zeros(1), text, kv_cache=cache)
    cache.begin_chunk(2)
    latents = torch.randn(1, 8, 2, 4, 4, requires_grad=True)
    model(latents, torch.full((1,), 500.0), text, kv_cache=cache).sample.sum().backward()
    assert latents.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------------------- size
def test_bytes_of_the_5b_configuration():
    """A window of 32 latent frames at 44 x 80, on no device."""
    with torch.device("meta"):
        model = LongLiveTransformer3DModel().to(torch.bfloat16)
    sizes = {}
    for dtype in (torch.bfloat16, *PACKED):
        cache = model.create_kv_cache(
            1, 44, 80, window_size=32, sink_size=8, multi_shot_sink=True, dtype=dtype, device="meta"
        )
        sizes[dtype] = cache.num_bytes
    # The buffers that are unpacked to are counted, too: two of the 60 of an unpacked cache.
    assert sizes[torch.bfloat16] / sizes["nvfp4"] > 3.16
    assert sizes[torch.bfloat16] / sizes["fp8"] > 1.87


def test_layers_share_one_pair_of_buffers():
    sizes = [
        small_transformer(num_layers=layers)
        .create_kv_cache(1, 4, 4, window_size=6, sink_size=2, multi_shot_sink=True, dtype="nvfp4")
        .num_bytes
        for layers in (1, 2, 3)
    ]
    layer = sizes[1] - sizes[0]
    assert sizes[2] - sizes[1] == layer
    assert sizes[0] - layer == 2 * 6 * 4 * 32 * 4  # key and value, frames, tokens, width, float32


# ------------------------------------------------------------------------------------------------------------- errors
def test_a_chunk_that_was_never_finished_is_noticed():
    model = small_transformer()
    cache = model.create_kv_cache(1, 4, 4, window_size=6, sink_size=2, multi_shot_sink=True, dtype="nvfp4")
    cache.begin_chunk(2)
    with pytest.raises(ValueError, match=r"never finished.*finish_chunk"):
        cache.begin_chunk(2)
    cache.finish_chunk()
    cache.begin_chunk(2)


def test_nothing_to_finish():
    cache = small_transformer().create_kv_cache(1, 4, 4, window_size=6, sink_size=2, multi_shot_sink=True)
    with pytest.raises(ValueError, match="No chunk is open"):
        cache.finish_chunk()


@pytest.mark.parametrize("dtype", ["int4", torch.int8, "NVFP4"])
def test_unknown_dtypes(dtype):
    with pytest.raises(ValueError, match="float32, bfloat16, float16, 'nvfp4' or 'fp8'"):
        small_transformer().create_kv_cache(1, 4, 4, window_size=6, sink_size=2, multi_shot_sink=True, dtype=dtype)
    with pytest.raises(ValueError, match="'nvfp4' or 'fp8'"):
        small_pipeline()(**tiny_arguments(kv_cache_dtype=dtype))


def test_relative_rope_rotates_unrounded_keys():
    """A sink that is rotated again and again is rounded once: from what was kept, not from what was rounded."""
    model = small_transformer()
    cache = model.create_kv_cache(
        1, 4, 4, window_size=6, sink_size=2, multi_shot_sink=True, dtype="nvfp4", relative_rope=True
    )
    torch.manual_seed(0)
    for _ in range(8):
        cache.begin_chunk(2)
        cache.finish_chunk()
        with torch.no_grad():
            model(torch.randn(1, 8, 2, 4, 4), torch.zeros(1), torch.randn(1, 8, 16), kv_cache=cache)
    layer = cache[0]
    (slot,) = [slot for slot, frame in enumerate(cache._samples[0].slots) if frame.index == 0]
    position = cache._samples[0].slots[slot].position
    raw = layer.raw_key[:, :, cache._samples[0].raw_slots[0]].transpose(1, 2)
    exact = apply_rotary(raw, rotary_embedding(torch.tensor([[position]]).double(), 2, 2, 16, theta=10000.0))
    key, _ = layer.get(6)
    assert relative(key[:, slot * 4 : slot * 4 + 4], exact) < 0.11


@pytest.mark.parametrize("for_keys", [True, False])
@pytest.mark.parametrize("store", FRAME_STORES.values(), ids=FRAME_STORES)
def test_packed_frames_are_stored_and_read_like_those_of_this_process(store, for_keys, monkeypatch):
    batch, heads, slots, tokens, head_dim, frames = 2, 3, 5, 4, 32, 2
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(batch, frames, heads, tokens, head_dim, generator=generator)
    samples, places = torch.arange(batch)[:, None], torch.tensor([[4, 1], [0, 2]])
    own, received = (
        store((batch, heads, slots, tokens, head_dim), torch.device("cpu"), for_keys=for_keys) for _ in range(2)
    )
    own.write(samples, places, states)
    packed = own.pack(states)
    assert packed.shape == (batch, frames, heads, sum(own.bytes_of_frame)) and packed.dtype == torch.uint8
    received.write_packed(samples, places, packed)
    assert all(torch.equal(part, other) for part, other in zip(own.parts, received.parts, strict=True))

    read = torch.zeros(batch, heads, slots, tokens, head_dim)
    own.read_into(read)
    unpacked = torch.zeros(batch, heads, frames, tokens, head_dim)
    given = []
    monkeypatch.setattr(store, "read_into", watched(store.read_into, given))
    received.read_packed(packed, unpacked)
    assert torch.equal(unpacked.transpose(1, 2), read[samples, :, places])
    assert given and all(part.is_contiguous() for part in given)  # as the GPU's kernels need them


def watched(read_into, given: list[torch.Tensor]):
    """`read_into`, with note of the parts that it is to read."""

    def read(self, target: torch.Tensor) -> None:
        given.extend(self.parts)
        read_into(self, target)

    return read


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("store", FRAME_STORES.values(), ids=FRAME_STORES)
@pytest.mark.parametrize("for_keys", [True, False], ids=["keys", "values"])
def test_frames_are_stored_alike_under_any_default_dtype(store, for_keys, dtype):
    shape = (1, 2, 2, 4, 16)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = stored(store(shape, CPU, for_keys=for_keys), states)
    with default_dtype(dtype):
        packed = store(shape, CPU, for_keys=for_keys)
        assert torch.equal(stored(packed, states), expected)
    assert {part.dtype for part in packed.parts} <= {torch.uint8, torch.float32}
