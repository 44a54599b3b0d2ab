"""torch.compile: the streaming forward is one graph, and a stream of any length needs a handful of them."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from longlive_diffusers import LongLiveTransformer3DModel
from tests.support.nvfp4_models import small_pipeline
from tests.support.tiny_pipeline import (
    CHUNK_SIZE,
    FORWARDS,
    every_forward,
    random_inputs,
    stream_chunks,
    tiny_arguments,
    tiny_cache,
    tiny_transformer,
)


# The first forward projects the text; then the window grows, which is a dynamic size from its second value on.
GRAPHS_OF_A_STREAM = 2


@pytest.fixture
def model() -> LongLiveTransformer3DModel:
    return tiny_transformer(num_layers=1)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@every_forward
def test_the_repeated_blocks_compile_to_one_graph(forward):
    model = tiny_transformer(num_layers=3)
    expected = forward(model)
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(forward(model), expected)
    assert counter.frame_count <= GRAPHS_OF_A_STREAM + 1, "the blocks share their graphs"


@torch.no_grad()
def test_streams_of_any_length_need_two_graphs(model):
    """aot_eager is what every real backend sees: writes to the cache must survive it."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(stream_chunks(compiled, num_chunks=10), stream_chunks(model, num_chunks=10))
    assert counter.frame_count == GRAPHS_OF_A_STREAM
    stream_chunks(compiled, num_chunks=12, seed=1)
    assert counter.frame_count == GRAPHS_OF_A_STREAM, "another video compiles nothing"


def latents_of_a_stream(pipe, seed: int, **settings) -> torch.Tensor:
    """Ten chunks with a new prompt before and after the window is full, and a cut."""
    arguments = tiny_arguments(num_frames=None, output_type="latent", **settings)
    arguments["generator"] = torch.Generator().manual_seed(seed)
    chunks = []
    with pipe.stream(**arguments) as session:
        for chunk in itertools.islice(session, 10):
            chunks.append(chunk.latents)
            if chunk.index in (0, 5):
                session.prompt = f"another prompt {chunk.index}"
            if chunk.index == 7:
                session.cut("a cut")
    return torch.cat(chunks, dim=2)


# Not all pairs, since each compiles four graphs, which takes seconds: what is stored is read the same way for both
# kinds of positions. A plain cache, which is read where it lies, is streamed by the other tests.
KINDS_OF_CACHES = [("nvfp4", True), ("fp8_attention", False)]


@pytest.mark.parametrize("kv_cache_dtype", [None, "fp8_attention"])
def test_compiled_blocks_attend_to_a_part_of_the_history(kv_cache_dtype):
    pipe, arguments = small_pipeline(), {"num_frames": 45, "kv_cache_dtype": kv_cache_dtype, "attention_density": 0.3}
    expected = pipe(**tiny_arguments(**arguments)).frames
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(pipe(**tiny_arguments(**arguments)).frames, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kv_cache_dtype", "relative_rope"), KINDS_OF_CACHES)
def test_whatever_happens_in_a_stream_four_graphs_are_enough(kv_cache_dtype, relative_rope):
    """For the first window and for all later ones, each with a text that is new and one that is cached."""
    pipe, settings = small_pipeline(), {"kv_cache_dtype": kv_cache_dtype, "relative_rope": relative_rope}
    expected = [latents_of_a_stream(pipe, seed, **settings) for seed in (0, 1)]
    counter = CompileCounterWithBackend("aot_eager")  # what every real backend sees: views and writes taken apart
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    for seed in (0, 1):
        torch.testing.assert_close(latents_of_a_stream(pipe, seed, **settings), expected[seed], atol=1e-4, rtol=1e-4)
    assert counter.frame_count <= 4


@torch.no_grad()
def test_a_new_prompt_is_seen_and_compiles_at_most_once(model):
    """Each network has a cache of its own: what is kept of a text must not outlive it in the compiled one's."""
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    caches = [tiny_cache(model) for _ in range(2)]
    for network, cache in zip((compiled, model), caches, strict=True):
        stream_chunks(network, num_chunks=4, cache=cache)
    before = counter.frame_count
    for seed in (1, 2, 1, 3):
        for cache in caches:
            cache.begin_chunk(CHUNK_SIZE)
        inputs = random_inputs(CHUNK_SIZE) | {
            "encoder_hidden_states": random_inputs(seed=seed)["encoder_hidden_states"]
        }
        found, expected = (
            network(**inputs, kv_cache=cache).sample for network, cache in zip((compiled, model), caches, strict=True)
        )
        torch.testing.assert_close(found, expected)
    assert counter.frame_count <= before + 1


@torch.no_grad()
def test_the_training_forward_compiles_for_every_length(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for frames in (2, 8):
        inputs = random_inputs(frames)
        torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample)


def test_gradients_pass_through_a_compiled_model(model):
    FORWARDS["teacher forcing"](model).square().mean().backward()
    expected = model.blocks[0].attn1.to_q.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    FORWARDS["teacher forcing"](compiled).square().mean().backward()
    torch.testing.assert_close(model.blocks[0].attn1.to_q.weight.grad, expected)


def kept_for_the_backward(model, frames: int) -> float:
    """Bytes for each frame, without the weights, and a gradient."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage takes its place
        return tensor

    inputs = random_inputs(frames) | {"clean_hidden_states": random_inputs(frames, seed=1)["hidden_states"]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs).sample
    output.square().sum().backward()
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights) / frames


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_keeps_no_histories(model, checkpointing):
    """What a step keeps grows with the clip, not with its square: concatenations are made again in the backward."""
    if checkpointing:
        model.enable_gradient_checkpointing()
    kept_for_the_backward(model, 4)
    expected = model.blocks[0].attn1.to_k.weight.grad.clone()
    model.zero_grad()
    # The backend's partitioner, which is also Inductor's, decides what is kept.
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager_decomp_partition", dynamic=False)
    short = kept_for_the_backward(model, 4)
    torch.testing.assert_close(model.blocks[0].attn1.to_k.weight.grad, expected, atol=1e-5, rtol=1e-5)
    assert kept_for_the_backward(model, 12) <= short


def gradient_of_a_stream(network, model) -> torch.Tensor:
    """Of five chunks, each with gradients, by one backward; `network` is `model`, or compiled from it."""
    model.zero_grad()
    stream_chunks(network, num_chunks=5, cache=tiny_cache(model, relative_rope=True)).square().mean().backward()
    return model.blocks[0].attn1.to_k.weight.grad.clone()


def test_gradients_pass_through_a_stream_of_compiled_blocks(model):
    """A checkpoint runs the compiled block again on a history that was overwritten meanwhile, by the same graph."""
    expected = gradient_of_a_stream(model, model)
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(gradient_of_a_stream(model, model), expected, atol=1e-6, rtol=1e-5)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient_of_a_stream(model, model), expected, atol=1e-6, rtol=1e-5)
    assert counter.frame_count <= GRAPHS_OF_A_STREAM


def test_gradients_pass_through_a_stream_of_a_compiled_model(model):
    """Which reads copies of the window, and where checkpointing stands back."""
    expected = gradient_of_a_stream(model, model)
    model.enable_gradient_checkpointing()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    torch.testing.assert_close(gradient_of_a_stream(compiled, model), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_block_causal_forward_can_be_exported(model):
    inputs = random_inputs()
    program = torch.export.export(model, (), inputs | {"return_dict": False}, strict=True)
    torch.testing.assert_close(program.module()(**inputs, return_dict=False)[0], model(**inputs).sample)
