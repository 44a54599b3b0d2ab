"""Attention in FP8 from a cache in FP8: what its codes are, what attention makes of them, and how scales are kept."""

import math

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from longlive_diffusers.fp8.e4m3 import from_codes, scales_of, to_codes
from longlive_diffusers.models.cudnn_attention import cudnn_fp8_attention, cudnn_unsupported_reason
from longlive_diffusers.models.fp8_layer_cache import QUERY_FACTOR, FP8LayerKVCache, attend_to_codes
from longlive_diffusers.models.scaled_frames import ScaledFrames
from tests.support.attention_kernels import ask_for_kernel
from tests.support.checks import needs_gpu
from tests.support.nvfp4_models import small_pipeline, small_transformer
from tests.support.tiny_pipeline import tiny_arguments


KIND = "fp8_attention"
SETTINGS = {"window_size": 6, "sink_size": 2, "multi_shot_sink": True, "dtype": KIND}


def video(pipe, num_frames: int) -> torch.Tensor:
    return pipe(**tiny_arguments(num_frames=num_frames, kv_cache_dtype=KIND)).frames


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


# -------------------------------------------------------------------------------------------------------------- codes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 0.3, 1.0, 7.0, 3e3])
def test_scales_are_powers_of_two_with_room_for_larger_numbers(size, dtype):
    states = size * torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    scales = scales_of(states.to(dtype), (1, 3))
    assert scales.shape == (2, 3) and scales.dtype == torch.float32
    assert (scales.log2() == scales.log2().round()).all()
    largest = states.to(dtype).float().abs().amax(dim=(1, 3)) / scales
    assert (largest >= 28).all() and (largest <= 56).all()


def test_tiny_numbers_leave_normal_scales():
    assert scales_of(torch.full((1, 1, 1, 1), 1e-38), (1, 3)) == 2.0**-100
    for number in (1e-45, 1e-38, 1e-30, 3e38):
        scale = scales_of(torch.full((1, 1, 1, 1), number), (1, 3))
        assert scale.isfinite() and scale.reciprocal().isfinite()


def test_the_scale_of_nothing_is_one():
    assert torch.equal(scales_of(torch.zeros(1, 4, 2, 8), (1, 3)), torch.ones(1, 2))


def test_codes_stand_for_the_nearest_numbers_and_end_at_448():
    numbers = torch.tensor([0.0, 1.0, -1.06, 17.0, 1e6, -1e6, math.inf, math.nan])
    found = from_codes(to_codes(numbers, 1.0), torch.float32)
    expected = torch.tensor([0.0, 1.0, -1.0, 16.0, 448.0, -448.0, 448.0, math.nan])
    assert torch.equal(found.nan_to_num(-7), expected.nan_to_num(-7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_all_codes(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(
        from_codes(codes, dtype).double().nan_to_num(-1), from_codes(codes, torch.float64).nan_to_num(-1)
    )


# ---------------------------------------------------------------------------------------------------------- attention
def in_codes(
    batch: int = 2, tokens: int = 6, length: int = 10, heads: int = 3, head_dim: int = 16
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, tokens, heads, head_dim), *[(batch, length, heads, head_dim)] * 2)
    states = (torch.randn(shape, generator=generator) for shape in shapes)
    return [to_codes(own, factor) for own, factor in zip(states, (QUERY_FACTOR, 16.0, 16.0), strict=True)]


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In float64, unrounded, in the unit of the values."""
    query, key, value = (from_codes(states, torch.float64) for states in (query, key, value))
    scores = torch.einsum("bthd,bnhd->bhtn", query / QUERY_FACTOR, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhtn,bnhd->bthd", scores.softmax(dim=-1), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "_native_math"])
def test_codes_are_attended_to_and_give_codes(dtype, backend):
    codes = in_codes()
    found = attend_to_codes(*codes, dtype, backend, None)
    exact = attended(*codes)
    assert relative(from_codes(found, torch.float64), exact) < 0.04
    if dtype == torch.float32:
        assert (found.int() - to_codes(exact, 1.0).int()).abs().max() <= 1


@needs_gpu
@pytest.mark.parametrize(
    "shape", [(1, 7, 13, 2, 16), (2, 130, 129, 3, 64), (1, 256, 1000, 4, 128), (2, 64, 64, 1, 128)]
)
def test_cudnn_attends_like_the_formula(shape):
    device = torch.device("cuda")
    if reason := cudnn_unsupported_reason(device, shape[-1]):
        pytest.skip(f"attention in FP8 {reason}")
    query, key, value = in_codes(*shape)
    exact = attended(query, key, value)
    memory = torch.zeros(2, shape[0], shape[3], shape[2] + 1, shape[4], dtype=torch.uint8, device=device)
    keys, values = memory[..., :-1, :]  # a gap between heads, as in a cache
    keys.copy_(key.transpose(1, 2))
    values.copy_(value.transpose(1, 2))
    for _ in range(2):
        found = cudnn_fp8_attention(query.to(device), keys, values, shape[-1] ** -0.5 / QUERY_FACTOR)
    assert found.shape == query.shape and found.is_contiguous()
    assert relative(from_codes(found.cpu(), torch.float64), exact) < 0.06
    assert torch.equal(
        attend_to_codes(query.to(device), *(own.to(device) for own in (key, value)), torch.bfloat16, None, None), found
    )


@needs_gpu
def test_a_video_is_that_of_a_cpu():
    if reason := cudnn_unsupported_reason(torch.device("cuda"), 16):
        pytest.skip(f"attention in FP8 {reason}")
    pipe = small_pipeline()
    expected = video(pipe, 61)
    assert relative(video(pipe.to("cuda"), 61).cpu(), expected) < 0.01


# ------------------------------------------------------------------------------------------------------------- scales
def forward(model, cache, seed: int, size: float = 1.0, batch: int = 1) -> torch.Tensor:
    """A finished chunk."""
    generator = torch.Generator().manual_seed(seed)
    latents = size * torch.randn(batch, 8, 2, 4, 4, generator=generator)
    text = torch.randn(1, 8, 16, generator=generator).expand(batch, -1, -1)
    cache.begin_chunk(2)
    cache.finish_chunk()
    with torch.no_grad():
        return model(latents, torch.zeros(batch), text, kv_cache=cache).sample


def scales(cache) -> list[torch.Tensor]:
    return [store.scale.clone() for layer in cache for store in (layer.key, layer.value)]


def test_scales_are_those_of_the_first_forward_until_the_next_video():
    model = small_transformer()
    cache = model.create_kv_cache(1, 4, 4, **SETTINGS)
    assert all(isinstance(layer, FP8LayerKVCache) and (layer.key.scale == 0).all() for layer in cache)
    forward(model, cache, 0)
    first = scales(cache)
    assert all((scale > 0).all() for scale in first)
    for seed in range(1, 5):
        forward(model, cache, seed)
    for _ in cache.recache():
        pass
    assert all(map(torch.equal, scales(cache), first))
    cache.reset()
    assert all((scale == 0).all() for scale in scales(cache))
    model.blocks[0].attn1.to_v.weight.data *= 64
    forward(model, cache, 0)
    assert torch.equal(cache[0].value.scale, 64 * first[1]) and torch.equal(cache[0].key.scale, first[0])


def test_a_video_of_a_batch_is_what_it_is_alone():
    """Its scales are its own, whatever is beside it."""
    model = small_transformer()
    sizes = (1.0, 30.0)
    caches = {batch: model.create_kv_cache(batch, 4, 4, **SETTINGS) for batch in (1, 2)}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        chunk, text = torch.randn(1, 8, 2, 4, 4, generator=generator), torch.randn(1, 8, 16, generator=generator)
        found = {}
        for batch, cache in caches.items():
            cache.begin_chunk(2)
            latents = torch.cat([size * chunk for size in sizes[:batch]])
            with torch.no_grad():
                sample = model(latents, torch.full((batch,), 500.0), text.expand(batch, -1, -1), kv_cache=cache).sample
            found[batch] = sample[:1]
        assert relative(found[2], found[1]) < 2e-3  # a number may be rounded the other way


def test_who_is_beside_a_video_changes_no_bit_of_it():
    model = small_transformer()
    generator = torch.Generator().manual_seed(0)
    chunks, text = torch.randn(4, 1, 8, 2, 4, 4, generator=generator), torch.randn(2, 8, 16, generator=generator)
    found = []
    for factor in (1.0, 50.0):
        cache, own = model.create_kv_cache(2, 4, 4, **SETTINGS), []
        for chunk in chunks:
            cache.begin_chunk(2)
            with torch.no_grad():
                latents = torch.cat([chunk, factor * chunk.flip(2)])
                own.append(model(latents, torch.full((2,), 500.0), text, kv_cache=cache).sample[0])
        found.append(torch.stack(own))
    assert torch.equal(*found)


def test_a_backward_after_a_reset_reads_the_history_with_its_own_scales():
    model = small_transformer()

    def gradient(between) -> torch.Tensor:
        cache = model.create_kv_cache(1, 4, 4, **SETTINGS)
        for seed in range(2):
            forward(model, cache, seed)
        cache.begin_chunk(2)
        latents = torch.randn(1, 8, 2, 4, 4, generator=torch.Generator().manual_seed(5)).requires_grad_()
        text = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(6))
        sample = model(latents, torch.full((1,), 500.0), text, kv_cache=cache).sample
        between(cache)
        return torch.autograd.grad(sample.square().sum(), model.blocks[0].attn1.to_q.weight)[0]

    def another_video(cache) -> None:
        cache.reset()
        forward(model, cache, 9, size=100.0)

    expected = gradient(lambda cache: None)
    assert torch.equal(gradient(lambda cache: cache.reset()), expected)
    assert torch.equal(gradient(another_video), expected)


def test_numbers_beyond_the_room_are_cut_off():
    store = ScaledFrames(torch.zeros(1, 1, 2, 4, 16, dtype=torch.uint8))
    store.calibrate(torch.ones(1, 4, 1, 16))
    frames = torch.tensor([7.0, 1e6]).reshape(1, 2, 1, 1, 1).expand(1, 2, 1, 4, 16)
    store.write(torch.tensor([[0]]), torch.tensor([[1, 0]]), frames)
    target = torch.empty(1, 1, 2, 4, 16)
    store.read_into(target)
    assert (target[:, :, 1] == 7).all() and (target[:, :, 0] == 448 * store.scale).all() and 7 < 448 * store.scale < 17


def test_taken_frames_have_the_scales_of_their_videos():
    store = ScaledFrames(torch.zeros(2, 3, 4, 5, 16, dtype=torch.uint8))
    states = torch.randn(2, 4, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    states[1] *= 1000
    store.calibrate(states.flatten(1, 1).transpose(2, 3).flatten(1, 2))
    store.write(torch.arange(2)[:, None], torch.arange(4).expand(2, -1), states)
    whole, part = torch.empty(2, 3, 4, 5, 16), torch.empty(3, 3, 1, 5, 16)
    store.read_into(whole)
    samples, slots = torch.tensor([1, 0, 1]), torch.tensor([2, 2, 0])
    taken = store.take(samples, slots)
    taken.read_into(part)
    assert torch.equal(part[:, :, 0], whole[samples, :, slots])
    before = store.codes.clone()
    store.codes[:] = 3
    store.put(samples, slots, taken)
    assert torch.equal(store.codes[samples, :, slots], before[samples, :, slots])


# ------------------------------------------------------------------------------------------------------------- videos
def test_a_cache_takes_half_of_bfloat16():
    model = small_transformer().bfloat16()
    plain = model.create_kv_cache(1, 4, 4, **SETTINGS | {"dtype": None}).num_bytes
    assert 0.5 <= model.create_kv_cache(1, 4, 4, **SETTINGS).num_bytes / plain < 0.53


def test_asking_for_a_kernel_keeps_the_cache():
    pipe = small_pipeline()
    expected = video(pipe, 37)
    ask_for_kernel(pipe.transformer, AttentionBackendName._NATIVE_MATH)
    assert relative(video(pipe, 37), expected) < 2e-3


@pytest.mark.parametrize(
    ("device", "capability", "head_dim", "message"),
    [
        ("cpu", None, 128, "needs a GPU, this is 'cpu'"),
        ("cuda", (8, 9), 128, r"9 to 11 \(Hopper, Blackwell B200\), this one has \(8, 9\)"),
        ("cuda", (12, 0), 128, r"this one has \(12, 0\)"),
        ("cuda", (9, 0), 24, "in multiples of 16 up to 128, this network's is 24"),
        ("cuda", (10, 0), 256, "up to 128, this network's is 256"),
        ("cuda", (9, 0), 128, r"nvidia-cudnn-frontend: pip install 'longlive-diffusers\[fp8-attention\]'"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, device, capability, head_dim, message):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: capability)
    monkeypatch.setattr("longlive_diffusers.models.cudnn_attention._load_cudnn", lambda: None)
    with pytest.raises(ValueError, match=message):
        raise ValueError(cudnn_unsupported_reason(torch.device(device), head_dim))


def test_cudnn_is_asked_where_it_can_be_had(monkeypatch):
    """And nothing is unpacked there."""
    asked = []

    def attend(query, key, value, logit_scale):
        asked.append((query.shape, key.shape, value.shape, logit_scale))
        return torch.zeros_like(query)

    monkeypatch.setattr("longlive_diffusers.models.fp8_layer_cache.has_cudnn_fp8", lambda device, head_dim: True)
    monkeypatch.setattr("longlive_diffusers.models.fp8_layer_cache.cudnn_fp8_attention", attend)
    codes = in_codes()
    assert (attend_to_codes(*codes, torch.bfloat16, None, None) == 0).all()
    assert asked == [((2, 6, 3, 16), (2, 3, 10, 16), (2, 3, 10, 16), 16**-0.5 / QUERY_FACTOR)]
    assert (attend_to_codes(*codes, torch.bfloat16, "_native_math", None) != 0).any() and len(asked) == 1
