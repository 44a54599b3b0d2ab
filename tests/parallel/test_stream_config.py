"""What `enable_parallelism` takes, and why it refuses the rest. One process is a process group, too."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig, WanTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh

from longlive_diffusers import LongLiveTransformer3DModel, NVFP4Config, StreamParallelConfig
from longlive_diffusers.nvfp4.quantizer import quantize_model
from longlive_diffusers.parallel.stream_config import resolve_stream_config
from tests.support.tiny_pipeline import stream_chunks, tiny_arguments, tiny_cache, tiny_pipeline, tiny_transformer


NUM_HEADS = 4


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "config",
    [
        ContextParallelConfig(ulysses_degree=2),
        ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2)),
        StreamParallelConfig(ulysses_degree=2),
    ],
)
def test_every_form_of_ulysses_is_taken(config):
    resolved = resolve_stream_config(config, None, NUM_HEADS)
    assert (resolved.ulysses_degree, resolved.num_ranks, resolved.exchange_dtype) == (2, 2, None)


def test_split_branches_take_twice_the_ranks():
    config = StreamParallelConfig(ulysses_degree=4, cfg_parallel=True, exchange_dtype="fp8")
    assert resolve_stream_config(config, None, NUM_HEADS) is config and config.num_ranks == 8
    assert StreamParallelConfig(cfg_parallel=True).num_ranks == 2


@pytest.mark.parametrize(
    "config, plan, message",
    [
        (ContextParallelConfig(ulysses_degree=3), None, "4 attention heads cannot be scattered over 3 ranks"),
        (ContextParallelConfig(ulysses_degree=8), None, "4 attention heads cannot be scattered over 8 ranks"),
        (ContextParallelConfig(ring_degree=2), None, "`ring_degree` must be 1, got 2: ring attention"),
        (ContextParallelConfig(ring_degree=2, ulysses_degree=2), None, "`ring_degree` must be 1, got 2"),
        (ContextParallelConfig(ring_degree=2, ring_anything=True), None, "`ring_degree` must be 1"),
        (ContextParallelConfig(ulysses_degree=2, ulysses_anything=True), None, "`ulysses_anything` must be False"),
        (TensorParallelConfig(tp_degree=2), None, "got TensorParallelConfig. Tensor parallelism splits the channels"),
        (ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2)), None, "got ParallelConfig"),
        (ContextParallelConfig(ulysses_degree=2), {}, "`cp_plan` must be None"),
        (ContextParallelConfig(ulysses_degree=2), WanTransformer3DModel._cp_plan, "`cp_plan` must be None"),
        (2, None, "got int"),
        (None, None, "got NoneType"),
        ({"ulysses_degree": 2}, None, "got dict"),
    ],
)
def test_what_a_stream_cannot_use_is_refused_with_the_reason(config, plan, message):
    with pytest.raises(ValueError, match=message):
        resolve_stream_config(config, plan, NUM_HEADS)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"exchange_dtype": "int8"}, r"`exchange_dtype` must be in \[None, 'fp8', 'nvfp4'\], got 'int8'"),
        ({"exchange_dtype": torch.float16}, "got torch.float16"),
        ({"cfg_parallel": "yes"}, "`cfg_parallel` must be True or False, got 'yes'"),
        ({"parallel_decode": None}, "`parallel_decode` must be True or False, got None"),
        ({"ulysses_degree": 0}, "`ulysses_degree` must be an integer of at least 1, got 0"),
        ({"ulysses_degree": -2}, "got -2"),
        ({"ulysses_degree": 2.0}, "got 2.0"),
        ({"ulysses_degree": True}, "got True"),
    ],
)
def test_settings_of_wrong_kinds_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        StreamParallelConfig(**settings)


def test_a_process_group_is_needed():
    with pytest.raises(ValueError, match=r'after `torch.distributed.init_process_group\("nccl"\)` on GPUs'):
        tiny_transformer().enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def test_a_refused_network_is_as_it_was():
    model = tiny_transformer()
    with pytest.raises(ValueError):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    assert model.stream_ranks is None
    stream_chunks(model)


def test_ranks_that_cannot_be_divided_are_counted(one_rank):
    with pytest.raises(ValueError, match="1 ranks cannot be divided into streams of 2: `ulysses_degree` is 2"):
        tiny_transformer().enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(ValueError, match="streams of 2: `ulysses_degree` is 1 for each of two branches of guidance"):
        tiny_transformer().enable_parallelism(config=StreamParallelConfig(cfg_parallel=True))


def test_a_mesh_needs_the_dimensions_by_name(one_rank):
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    with pytest.raises(ValueError, match=r"needs dimensions named \('ulysses',\), it has \('dp',\)"):
        tiny_transformer().enable_parallelism(config=StreamParallelConfig(mesh=mesh))
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("ring", "ulysses"))
    with pytest.raises(ValueError, match="`mesh` has 1 x 1 ranks of a stream, but `ulysses_degree` is 2"):
        tiny_transformer().enable_parallelism(config=StreamParallelConfig(mesh=mesh, ulysses_degree=2))
    model = tiny_transformer()
    model.enable_parallelism(config=StreamParallelConfig(mesh=mesh))
    assert (model.stream_ranks.rank, model.stream_ranks.size) == (0, 1)


def test_one_rank_makes_the_video_of_one_process(one_rank):
    pipe, alone = tiny_pipeline(), tiny_pipeline()
    pipe.transformer.enable_parallelism(config=StreamParallelConfig())
    arguments = {"output_type": "pt", "num_frames": 29}
    found, expected = (p(**tiny_arguments(**arguments)).frames for p in (pipe, alone))
    assert torch.equal(found, expected)


def test_split_branches_need_guidance(one_rank):
    pipe = tiny_pipeline()
    pipe.transformer.enable_parallelism(config=StreamParallelConfig())
    ranks = pipe.stream_ranks
    ranks.branch = 0  # one process cannot be two halves
    with pytest.raises(ValueError, match="`guidance_scale` 1 or 0 means none: half of the 1 ranks"):
        pipe(**tiny_arguments())


def test_a_backend_for_gpus_is_named_where_the_network_is_not_on_one(one_rank):
    pipe = tiny_pipeline()
    pipe.transformer.enable_parallelism(config=StreamParallelConfig())
    pipe.stream_ranks.backend = "nccl"
    with pytest.raises(ValueError, match="'nccl' sends between GPUs, and the transformer or the VAE is on the CPU"):
        pipe(**tiny_arguments())


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_loading_enables_it_too(one_rank, tmp_path, is_wrapped):
    tiny_transformer().save_pretrained(tmp_path)
    config = StreamParallelConfig()
    config = ParallelConfig(context_parallel_config=config) if is_wrapped else config
    model = LongLiveTransformer3DModel.from_pretrained(tmp_path, parallel_config=config)
    assert model.stream_ranks.size == 1
    with pytest.raises(ValueError, match="shared by 1 ranks already"):
        model.enable_parallelism(config=StreamParallelConfig())


def test_what_cannot_be_used_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="got TensorParallelConfig"):
        LongLiveTransformer3DModel.from_pretrained(
            tmp_path / "nothing", parallel_config=TensorParallelConfig(tp_degree=2)
        )


def test_forwards_with_gradients_are_refused_and_those_without_a_cache_are_not_changed(one_rank):
    model, alone = tiny_transformer(), tiny_transformer()
    model.enable_parallelism(config=StreamParallelConfig())
    cache = tiny_cache(model)
    cache.begin_chunk(2)
    latents, text = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 8, 16)
    with pytest.raises(ValueError, match="has no gradients: call this under"):
        model(latents, torch.zeros(1), text, kv_cache=cache)
    whole = [network(latents, torch.zeros(1), text).sample for network in (model, alone)]
    assert torch.equal(*whole) and whole[0].requires_grad


def test_a_shared_network_is_not_quantized(one_rank):
    model = tiny_transformer(attention_head_dim=16, ffn_dim=64)
    model.enable_parallelism(config=StreamParallelConfig())
    with pytest.raises(ValueError, match="shared by several ranks already: quantize it before"):
        quantize_model(model, NVFP4Config())


def test_a_copy_is_on_the_same_ranks_and_a_pickle_is_refused(one_rank):
    model = tiny_transformer()
    model.enable_parallelism(config=StreamParallelConfig())
    assert copy.deepcopy(model).stream_ranks is model.stream_ranks
    with pytest.raises(ValueError, match="cannot be pickled: save it with `save_pretrained`"):
        pickle.dumps(model)
