"""Memory: offloading in each of diffusers' and accelerate's ways, layerwise casting, and what a forward allocates.

Without an accelerator, offloading means: parameters are away (on the meta device, on disk) but while their layer runs.
"""

from collections import Counter

import accelerate
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longlive_diffusers import LongLiveTransformer3DModel
from tests.support.checks import needs_gpu
from tests.support.tiny_pipeline import (
    CHUNK_SIZE,
    FORWARDS,
    every_forward,
    like,
    random_inputs,
    stream_chunks,
    tiny_cache,
    tiny_transformer,
)


CPU = torch.device("cpu")


@pytest.fixture
def model() -> LongLiveTransformer3DModel:
    return tiny_transformer()


@pytest.fixture
def expected(model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: forward(model) for name, forward in FORWARDS.items()}


class Offloaded:
    """`model`, said to be where and what `placed` is: its own parameters are elsewhere. Caches come from `placed`."""

    def __init__(self, model, placed: LongLiveTransformer3DModel):
        self.model, self.device, self.dtype = model, placed.device, placed.dtype
        self.create_kv_cache = placed.create_kv_cache

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@torch.no_grad()
def forwards_of(model) -> dict[str, torch.Tensor]:
    return {name: forward(Offloaded(model, tiny_transformer())) for name, forward in FORWARDS.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def spy_on_devices(model) -> Counter:
    """On which devices the parameters of other blocks are while a block runs."""
    devices = Counter()
    first, last = model.blocks[0], model.blocks[-1]
    inner = first.ffn.forward

    def forward(*args, **kwargs):
        devices.update([last.attn1.to_q.weight.device.type])
        return inner(*args, **kwargs)

    first.ffn.forward = forward
    return devices


# -- accelerate ------------------------------------------------------------------------------------------------------


def test_cpu_offload_computes_the_same(model, expected):
    devices = spy_on_devices(model)
    accelerate.cpu_offload(model, execution_device=CPU)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_equal(forwards_of(model), expected)
    assert set(devices) == {"meta"}, "one layer at a time"


def test_disk_offload_computes_the_same(model, expected, tmp_path):
    accelerate.disk_offload(model, str(tmp_path), execution_device=CPU)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_equal(forwards_of(model), expected)


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # accelerate knows of no bare parameters
def test_a_device_map_splits_the_model_between_cpu_and_disk(model, expected, tmp_path):
    model.save_pretrained(tmp_path / "model")
    device_map = dict.fromkeys(
        ["patch_embedding", "condition_embedder", "norm_out", "proj_out", "scale_shift_table"], "cpu"
    )
    device_map |= {"blocks.0": "cpu", "blocks.1": "disk"}
    loaded = LongLiveTransformer3DModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert {p.device.type for p in loaded.blocks[0].parameters()} == {"cpu"}
    assert {p.device.type for p in loaded.blocks[1].parameters()} == {"meta"}
    assert_equal(forwards_of(loaded), expected)


def test_an_automatic_device_map_never_splits_a_block():
    model = tiny_transformer(num_layers=4)
    size = model.get_memory_footprint()
    device_map = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": size * 3 // 4, "disk": size}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    assert {name for name in device_map if name.startswith("blocks")} == {f"blocks.{i}" for i in range(4)}


# -- group offloading ------------------------------------------------------------------------------------------------

GROUPS = {
    "leaf level": {"offload_type": "leaf_level"},
    "each block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "two blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
}
every_grouping = pytest.mark.parametrize("grouping", GROUPS.values(), ids=GROUPS)


@every_grouping
def test_group_offload_to_disk_computes_the_same(model, expected, tmp_path, grouping):
    """Offloaded weights are really gone (empty tensors), so that a layer that is not brought back shows."""
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_to_disk_path=str(tmp_path), **grouping)
    assert list(tmp_path.glob("group_*.safetensors"))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    assert_equal(forwards_of(model), expected)


@every_grouping
def test_group_offload_leaves_the_cache_where_it_is(model, expected, grouping):
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **grouping)
    cache = tiny_cache(tiny_transformer())
    storage = cache[0].key.data_ptr()
    with torch.no_grad():
        found = stream_chunks(model, cache=cache)
    assert torch.equal(found, expected["streaming"])
    assert cache[0].key.data_ptr() == storage and cache[0].key.any()


@needs_gpu
@torch.no_grad()
@every_grouping
@pytest.mark.parametrize("use_stream", [False, True])
def test_group_offload_to_the_cpu_computes_the_same_on_a_gpu(grouping, use_stream):
    placed = tiny_transformer(num_layers=4).cuda()
    model = tiny_transformer(num_layers=4)
    model.enable_group_offload(onload_device=torch.device("cuda"), use_stream=use_stream, **grouping)
    for _ in range(2):  # with streams, the first forward only learns the order of the layers
        found = stream_chunks(Offloaded(model, placed))
        torch.testing.assert_close(found, stream_chunks(placed), atol=1e-5, rtol=1e-5)
    # With streams a layer brings the next one: also what only runs when the text is new, and not in every forward.
    left = {name for name, parameter in model.named_parameters() if parameter.is_cuda}
    assert not {name for name in left if ".attn2.to_k." not in name and ".text_embedder." not in name}
    assert use_stream or not left


# -- layerwise casting -----------------------------------------------------------------------------------------------


@torch.no_grad()
@every_forward
def test_layerwise_casting_stores_8_bits_and_computes_nearly_the_same(model, forward):
    expected = forward(model)
    before = model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.dtype == torch.float32
    assert model.get_memory_footprint() < 0.6 * before
    difference = (forward(model) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < difference < 0.05


def test_layerwise_casting_keeps_norms_embeddings_and_modulation(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    linears = {
        f"blocks.{i}.{a}.{n}"
        for i in range(2)
        for a in ("attn1", "attn2")
        for n in ("to_q", "to_k", "to_v", "to_out.0")
    }
    linears |= {f"blocks.{i}.ffn.net.{n}" for i in range(2) for n in ("0.proj", "2")}
    assert stored == {f"{name}.{part}" for name in linears for part in ("weight", "bias")}


def test_layerwise_casting_leaves_float32_modules_of_a_bfloat16_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    model = LongLiveTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["scale_shift_table"] == dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    with torch.no_grad():
        assert stream_chunks(model).dtype == torch.bfloat16


@pytest.mark.parametrize("skipped", [None, ("norm",)], ids=["default", "all but norms"])
def test_a_layerwise_cast_model_trains(model, skipped):
    if skipped is None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    else:
        apply_layerwise_casting(model, torch.bfloat16, torch.float32, skip_modules_pattern=skipped)
    model.train()
    FORWARDS["teacher forcing"](model).square().mean().backward()
    gradient = model.blocks[0].attn1.to_q.weight.grad
    assert gradient is not None and torch.isfinite(gradient).all() and gradient.any()


def test_layerwise_casting_and_group_offload_go_together(model, tmp_path):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with torch.no_grad():
        expected = stream_chunks(model)
        model.enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
        )
        assert torch.equal(stream_chunks(model), expected)


# -- what a forward allocates ----------------------------------------------------------------------------------------


class NewBytes(TorchDispatchMode):
    """Counts the bytes of new storage that each operation returns; views and writes in place are none."""

    def __init__(self):
        super().__init__()
        self.by_operation = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.by_operation[operation.overloadpacket.__name__] += tensor.untyped_storage().nbytes()
        return result


@torch.no_grad()
def bytes_by_chunk(model, num_chunks: int, **settings) -> list[Counter]:
    cache = tiny_cache(model, window_size=40, **settings)
    inputs = like(model, random_inputs(CHUNK_SIZE))
    counts = []
    for _ in range(num_chunks):
        cache.begin_chunk(CHUNK_SIZE)
        with NewBytes() as new:
            model(**inputs, kv_cache=cache)
        counts.append(new.by_operation)
    return counts


@pytest.mark.parametrize("relative_rope", [False, True])
def test_a_forward_allocates_the_same_however_long_the_history_is(model, relative_rope):
    first, *later = bytes_by_chunk(model, num_chunks=24, relative_rope=relative_rope)
    assert len(later) > 40 / CHUNK_SIZE, "the window fills up, and frames are evicted"
    assert all(count == later[0] for count in later)
    assert sum(first.values()) > sum(later[0].values()), "the first also projects the text"


def test_in_bfloat16_on_a_cpu_only_attention_scores_grow(model, tmp_path):
    model.save_pretrained(tmp_path)
    model = LongLiveTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    early, late = (sum(count.values()) for count in bytes_by_chunk(model, num_chunks=20)[1::18])
    tokens, layers, heads, width, bfloat16 = 4, 2, 2, 24, 2
    queries, new_keys = CHUNK_SIZE * tokens, 18 * CHUNK_SIZE * tokens
    scores = layers * heads * queries * new_keys * bfloat16
    assert late - early <= 2 * scores, "scores and their softmax"
    assert 2 * scores < layers * 2 * new_keys * width * bfloat16, "a copy of keys and values would show"


def test_measuring_allocations_notices_a_copy_of_the_cache(model):
    """A cache in another dtype than the network's is converted when it is read, and that does grow."""
    early, late = bytes_by_chunk(model, num_chunks=20, dtype=torch.bfloat16)[1::18]
    assert {name for name in late if late[name] != early[name]} == {"_to_copy"}


@pytest.mark.parametrize("num_chunks", [1, 20])
def test_the_cache_itself_is_as_large_as_promised(model, num_chunks):
    cache = tiny_cache(model, window_size=40)
    with torch.no_grad():
        stream_chunks(model, num_chunks=num_chunks, cache=cache)
    tokens, layers, float32 = 4, 2, 4
    assert cache.num_bytes == layers * 2 * 40 * tokens * 24 * float32
