"""Attention as diffusers lets a user change it (processors, fused projections, backends), and the cached text."""

from collections import Counter

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from peft import LoraConfig
from torch.nn.attention.flex_attention import flex_attention

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.models.attend import attend
from longlive_diffusers.models.attention import LongLiveAttnProcessor
from longlive_diffusers.nvfp4 import NVFP4Config, quantize_model
from tests.support.checks import logged_by
from tests.support.nvfp4_models import small_transformer
from tests.support.tiny_pipeline import (
    CHUNK_SIZE,
    FORWARDS,
    every_forward,
    random_inputs,
    stream_chunks,
    tiny_cache,
    tiny_transformer,
)


@pytest.fixture
def model() -> LongLiveTransformer3DModel:
    return tiny_transformer()


@pytest.fixture(autouse=True)
def default_backend():
    """`set_attention_backend` also changes diffusers' own default, for all models."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


class CountingProcessor(LongLiveAttnProcessor):
    """What a user's own processor looks like."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


# -- processors ------------------------------------------------------------------------------------------------------


def test_every_attention_has_a_processor_of_its_own(model):
    processors = model.attn_processors
    names = {f"blocks.{block}.{attention}.processor" for block in range(2) for attention in ("attn1", "attn2")}
    assert set(processors) == names
    assert len({id(processor) for processor in processors.values()}) == 4
    assert {type(processor) for processor in processors.values()} == {LongLiveAttnProcessor}


@torch.no_grad()
@every_forward
def test_one_processor_can_be_set_for_all(model, forward):
    expected = forward(model)
    processor = CountingProcessor()
    model.set_attn_processor(processor)
    assert all(found is processor for found in model.attn_processors.values())
    assert torch.equal(forward(model), expected)
    assert processor.calls > 0 and processor.calls % 4 == 0


@torch.no_grad()
def test_processors_can_be_set_by_name(model):
    expected = FORWARDS["block causal"](model)
    processors = {name: CountingProcessor() for name in model.attn_processors}
    model.set_attn_processor(dict(processors))
    assert model.attn_processors == processors
    assert torch.equal(FORWARDS["block causal"](model), expected)
    assert all(processor.calls == 1 for processor in processors.values())


def test_too_few_processors_raise_and_say_how_many(model):
    processors = model.attn_processors
    processors.popitem()
    with pytest.raises(ValueError, match=r"3 does not match the number of attention layers: 4"):
        model.set_attn_processor(processors)


def test_a_processor_under_a_wrong_name_raises(model):
    processors = model.attn_processors
    processors["blocks.9.attn1.processor"] = processors.pop("blocks.0.attn1.processor")
    with pytest.raises(KeyError, match=r"blocks\.0\.attn1\.processor"):
        model.set_attn_processor(processors)


# -- fused projections -----------------------------------------------------------------------------------------------


@torch.no_grad()
@every_forward
def test_fused_projections_compute_the_same(model, forward):
    expected = forward(model)
    model.fuse_qkv_projections()
    assert all(block.attn1.fused_projections and block.attn2.fused_projections for block in model.blocks)
    assert model.blocks[0].attn1.to_q is model.blocks[0].attn2.to_v is None
    torch.testing.assert_close(forward(model), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@every_forward
def test_projections_can_be_unfused(model, forward):
    expected = forward(model)
    names = set(model.state_dict())
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    assert set(model.state_dict()) == names
    assert not any(block.attn1.fused_projections for block in model.blocks)
    assert torch.equal(forward(model), expected)


def test_fusing_twice_is_fusing_once(model):
    model.fuse_qkv_projections()
    fused = model.blocks[0].attn1.to_qkv
    model.fuse_qkv_projections()
    assert model.blocks[0].attn1.to_qkv is fused


# -- backends --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_forward
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_a_backend_set_is_the_backend_used_in_its_context_and_both_are_near_native(model, forward, backend):
    expected = forward(model)
    with attention_backend(backend):
        in_context = forward(model)
    model.set_attention_backend(backend)
    was_set = forward(model)
    torch.testing.assert_close(was_set, in_context, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(was_set, expected, atol=1e-5, rtol=1e-5)


def test_setting_a_backend_reaches_every_processor_and_can_be_undone(model):
    model.set_attention_backend("_native_math")
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {
        AttentionBackendName._NATIVE_MATH
    }
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}


def test_an_unknown_backend_raises(model):
    with pytest.raises(ValueError, match="no_such_backend"):
        model.set_attention_backend("no_such_backend")


@torch.no_grad()
def test_every_attention_goes_through_the_dispatcher(model, monkeypatch):
    counts, backend = Counter(), "native"
    function = _AttentionBackendRegistry._backends[AttentionBackendName(backend)]

    def counting(*args, **kwargs):
        counts[backend] += 1
        return function(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(backend), counting)
    model.set_attention_backend(backend)
    stream_chunks(model, num_chunks=3)
    assert counts == {backend: 3 * 2 * len(model.blocks)}


@torch.no_grad()
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_half_precision_on_a_cpu_is_near_every_backend(model, tmp_path, backend):
    """Where no backend is set, bfloat16 on a CPU takes a shorter way."""
    model.save_pretrained(tmp_path)
    model = LongLiveTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = stream_chunks(model)
    model.set_attention_backend(backend)
    torch.testing.assert_close(stream_chunks(model), expected, atol=0.05, rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("forward", [FORWARDS["block causal"], FORWARDS["teacher forcing"]], ids=list(FORWARDS)[:2])
def test_flex_gets_the_rule_as_one_block_mask(model, monkeypatch, forward):
    masks = []

    def spying(*args, block_mask=None):
        masks.append(block_mask)
        return flex_attention(*args, block_mask=block_mask)

    monkeypatch.setattr("longlive_diffusers.models.flex.flex_attention", spying)
    with logged_by("diffusers"):
        model.set_attention_backend("flex")
    forward(model)
    self_attention = [mask for mask in masks if mask is not None]
    assert len(self_attention) == len(model.blocks), "one call for each block, not one for each chunk"
    assert len(masks) == 2 * len(model.blocks)


@pytest.mark.parametrize("forward", list(FORWARDS.values()), ids=list(FORWARDS))
def test_attention_has_one_dtype_where_autocast_normalizes_in_float32(model, forward, monkeypatch):
    """A GPU's autocast does, a CPU's does not. Attention would convert to copies that nobody shares, or refuse."""
    for block in model.blocks:
        for attention in (block.attn1, block.attn2):
            for norm in (attention.norm_q, attention.norm_k):
                norm.register_forward_hook(lambda module, arguments, output: output.float())
    dtypes = set()

    def noting(query, key, value, *options):
        dtypes.update({query.dtype, key.dtype, value.dtype})
        return attend(query, key, value, *options)

    for module in ("attend", "attention", "chunk_mask"):
        monkeypatch.setattr(f"longlive_diffusers.models.{module}.attend", noting)
    with torch.autocast("cpu", torch.bfloat16):
        forward(model)
    assert dtypes == {torch.bfloat16}


def weight_bytes(model) -> int:
    storages = {own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in model.parameters()}
    return sum(storages.values())


def test_fused_projections_are_in_memory_once(model):
    before, names = weight_bytes(model), list(model.state_dict())
    model.fuse_qkv_projections()
    assert weight_bytes(model) == weight_bytes(model.to(torch.float64)) / 2 == before
    model.unfuse_qkv_projections()
    assert weight_bytes(model) == 2 * before and list(model.state_dict()) == names


@torch.no_grad()
def test_what_fused_projections_learn_stays_when_they_are_split(model):
    forward = FORWARDS["block causal"]
    model.fuse_qkv_projections()
    for block in model.blocks:
        for layer in (block.attn1.to_qkv, block.attn2.to_kv):
            layer.weight.mul_(2)
            layer.bias.add_(1)
    expected = forward(model)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(forward(model), expected, atol=1e-5, rtol=1e-5)


def test_fused_projections_are_trained_where_the_separate_ones_are(model):
    model.requires_grad_(False).eval()
    model.fuse_qkv_projections()
    assert not any(own.requires_grad for own in model.parameters())
    model.unfuse_qkv_projections()
    assert not any(own.requires_grad or module.training for module in model.modules() for own in module.parameters())


def quantize(model) -> None:
    quantize_model(model, NVFP4Config())


def add_hooks(model) -> None:
    model.blocks[1].attn2.to_kv.register_forward_pre_hook(lambda module, args: None)


@pytest.mark.parametrize("change", [quantize, add_hooks])
def test_fused_projections_that_were_changed_are_not_split(change):
    model = small_transformer()
    model.fuse_qkv_projections()
    change(model)
    with pytest.raises(ValueError, match=r"of blocks\.\d\.attn\d were changed since, into .* cannot be split"):
        model.unfuse_qkv_projections()
    assert all(block.attn1.fused_projections for block in model.blocks)


def test_projections_that_are_cast_by_themselves_are_not_fused(model):
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"12 projections .* blocks\.0\.attn1\.to_q \(with hooks\)"):
        model.fuse_qkv_projections()
    assert not any(block.attn1.fused_projections for block in model.blocks)


def test_projections_that_are_no_plain_layers_are_not_fused(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"4 projections .* for instance blocks.0.attn1.to_q \(Linear\)"):
        model.fuse_qkv_projections()
    quantized = small_transformer()
    quantize_model(quantized, NVFP4Config())
    with pytest.raises(ValueError, match="NVFP4Linear"):
        quantized.fuse_qkv_projections()


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def text_projections(model) -> Counter:
    """How often the network projected text: once at its entrance, and to keys and values in every block."""
    counts = Counter()
    layers = {"entrance": model.condition_embedder.text_embedder}
    layers |= {f"{i}.{n}": getattr(b.attn2, n) for i, b in enumerate(model.blocks) for n in ("to_k", "to_v")}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: counts.update([name]))
    counts.layers = set(layers)
    return counts


def assert_counts(counts: Counter, expected: int):
    assert dict(counts) == dict.fromkeys(counts.layers, expected)


def forward_chunk(model, cache, text: torch.Tensor):
    inputs = random_inputs(CHUNK_SIZE)
    return model(inputs["hidden_states"], inputs["timestep"], text, kv_cache=cache).sample


@torch.no_grad()
def test_text_is_projected_once_for_a_stream(model, text_projections):
    stream_chunks(model, num_chunks=6)
    assert_counts(text_projections, 1)


@torch.no_grad()
def test_text_of_another_dtype_is_projected_once_as_well(model, text_projections):
    model.to(torch.bfloat16)
    cache = tiny_cache(model)
    cache.begin_chunk(CHUNK_SIZE)
    text = random_inputs()["encoder_hidden_states"]
    assert text.dtype == torch.float32
    outputs = [forward_chunk(model, cache, text) for _ in range(3)]
    assert_counts(text_projections, 1)
    assert all(torch.equal(output, outputs[0]) and output.dtype == torch.bfloat16 for output in outputs)


@torch.no_grad()
def test_text_is_projected_again_when_it_is_another(model, text_projections):
    cache = tiny_cache(model)
    cache.begin_chunk(CHUNK_SIZE)
    first, second = (random_inputs(seed=seed)["encoder_hidden_states"] for seed in (1, 2))
    outputs = [forward_chunk(model, cache, text) for text in (first, first, second, second, first)]
    assert_counts(text_projections, 3)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[4])
    assert not torch.allclose(outputs[1], outputs[2])


@torch.no_grad()
def test_text_is_projected_again_when_it_was_changed_in_place(model, text_projections):
    cache = tiny_cache(model)
    cache.begin_chunk(CHUNK_SIZE)
    text = random_inputs(seed=1)["encoder_hidden_states"]
    before = forward_chunk(model, cache, text)
    text.mul_(2)
    assert not torch.allclose(forward_chunk(model, cache, text), before)
    assert_counts(text_projections, 2)


@torch.no_grad()
def test_each_cache_has_its_own_text(model, text_projections):
    caches = [tiny_cache(model), tiny_cache(model)]
    texts = [random_inputs(seed=seed)["encoder_hidden_states"] for seed in (1, 2)]
    for cache in caches:
        cache.begin_chunk(CHUNK_SIZE)
    for _ in range(3):
        for cache, text in zip(caches, texts, strict=True):
            forward_chunk(model, cache, text)
    assert_counts(text_projections, 2)


@torch.no_grad()
def test_a_cache_that_is_reset_forgets_the_text(model, text_projections):
    cache = tiny_cache(model)
    for _ in range(2):
        cache.reset()
        cache.begin_chunk(CHUNK_SIZE)
        forward_chunk(model, cache, random_inputs()["encoder_hidden_states"])
    assert_counts(text_projections, 2)


def test_streams_in_inference_mode(model):
    with torch.no_grad():
        expected = stream_chunks(model)
    with torch.inference_mode():
        found = stream_chunks(model)
    assert torch.equal(found, expected)
