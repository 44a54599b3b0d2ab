"""Who sees whom, and that the ways of computing attention agree."""

import functools
import shutil

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from longlive_diffusers.models import flex
from longlive_diffusers.models.attend import attend
from longlive_diffusers.models.attention import LongLiveAttnProcessor
from longlive_diffusers.models.chunk_mask import ChunkMask, prefixes
from longlive_diffusers.models.compiled import compiled_for
from longlive_diffusers.models.flex import needs_compilation
from longlive_diffusers.models.layer_kv_cache import LayerKVCache
from tests.support.checks import needs_gpu
from tests.support.tiny_pipeline import tiny_cache, tiny_transformer


HEADS, HEAD_DIM = 2, 8
MASKS = [
    ChunkMask(num_chunks, chunk_tokens, has_clean)
    for has_clean in (False, True)
    for num_chunks, chunk_tokens in [(1, 1), (1, 6), (2, 3), (3, 4), (5, 2)]
]
every_mask = pytest.mark.parametrize(
    "mask", MASKS, ids=lambda m: f"{m.num_chunks}x{m.chunk_tokens} {'clean and noisy' if m.has_clean else 'noisy'}"
)


def num_tokens(mask: ChunkMask) -> int:
    return mask.num_halves * mask.num_chunks * mask.chunk_tokens


def table(mask: ChunkMask) -> torch.Tensor:
    """`allows` for all tokens, bool `[queries, keys]`."""
    tokens = torch.arange(num_tokens(mask))
    return mask.allows(tokens[:, None], tokens[None, :])


def random_states(tokens: int, count: int = 3, batch: int = 2, dtype=torch.float32, seed: int = 0) -> list:
    """`count` tensors `[batch, tokens, heads, head_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def textbook_attention(query, key, value, mask: torch.Tensor | None = None) -> torch.Tensor:
    heads_first = (states.transpose(1, 2) for states in (query, key, value))
    return scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def seen_by_dense(mask: ChunkMask) -> torch.Tensor:
    """What `dense` really reads: to a query of zeros, all keys that it sees weigh the same; the others nothing."""
    tokens = num_tokens(mask)
    query = torch.zeros(1, tokens, 1, tokens)
    identity = torch.eye(tokens).view(1, tokens, 1, tokens)
    return mask.dense(query, query, identity, None).view(tokens, tokens)


def test_teacher_forcing_table():
    """Clean chunks C0 C1 C2, noisy ones N0 N1 N2: a noisy chunk sees the clean past and itself, nothing noisy else."""
    mask = ChunkMask(num_chunks=3, chunk_tokens=1, has_clean=True)
    #    keys:  C0 C1 C2 N0 N1 N2
    expected = [
        [1, 0, 0, 0, 0, 0],  # C0
        [1, 1, 0, 0, 0, 0],  # C1
        [1, 1, 1, 0, 0, 0],  # C2
        [0, 0, 0, 1, 0, 0],  # N0
        [1, 0, 0, 0, 1, 0],  # N1
        [1, 1, 0, 0, 0, 1],  # N2
    ]
    assert table(mask).int().tolist() == expected
    assert (seen_by_dense(mask) > 0).int().tolist() == expected


def test_block_causal_table():
    """Two chunks of two tokens: within a chunk all see each other, and the past is seen whole."""
    mask = ChunkMask(num_chunks=2, chunk_tokens=2, has_clean=False)
    expected = [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    assert table(mask).int().tolist() == expected
    assert (seen_by_dense(mask) > 0).int().tolist() == expected


@every_mask
def test_every_query_sees_as_many_keys_as_the_rule_says(mask):
    """Chunk b of either half sees b + 1 chunks: itself and b of the past."""
    per_chunk = [(b + 1) * mask.chunk_tokens for b in range(mask.num_chunks)]
    expected = [count for count in per_chunk for _ in range(mask.chunk_tokens)] * mask.num_halves
    assert table(mask).sum(dim=1).tolist() == expected
    assert (seen_by_dense(mask) > 0).sum(dim=1).tolist() == expected


@every_mask
def test_dense_is_attention_under_the_boolean_mask(mask):
    query, key, value = random_states(num_tokens(mask))
    expected = textbook_attention(query, key, value, table(mask))
    torch.testing.assert_close(mask.dense(query, key, value, None), expected, atol=1e-6, rtol=0)


@every_mask
def test_dense_has_the_gradients_of_attention_under_the_boolean_mask(mask):
    inputs = random_states(num_tokens(mask))
    (weight,) = random_states(num_tokens(mask), count=1, seed=1)
    gradients = []
    for compute in (lambda *qkv: mask.dense(*qkv, None), lambda *qkv: textbook_attention(*qkv, table(mask))):
        leaves = [states.clone().requires_grad_() for states in inputs]
        (compute(*leaves) * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


@every_mask
def test_the_block_mask_of_flex_attention_is_the_same_rule(mask):
    tokens = num_tokens(mask)
    block_mask = mask.block_mask(torch.device("cpu"))
    assert block_mask.shape == (1, 1, tokens, tokens)
    index = torch.arange(tokens)
    assert torch.equal(block_mask.mask_mod(0, 0, index[:, None], index[None, :]), table(mask))
    assert mask.block_mask(torch.device("cpu")) is block_mask, "made once for each shape"


@pytest.mark.parametrize("has_clean", [True, False], ids=["teacher forcing", "causal"])
@pytest.mark.parametrize(
    ("chunks", "chunk_tokens", "ranks"), [(4, 128, 1), (4, 100, 2), (6, 40, 3), (3, 300, 1), (2, 640, 2), (5, 7, 1)]
)
def test_the_blocks_are_those_that_the_rule_gives_token_by_token(chunks, chunk_tokens, ranks, has_clean):
    mask = ChunkMask(chunks, chunk_tokens, has_clean, ranks)
    ours, tokens = mask.block_mask(torch.device("cpu")), num_tokens(mask)
    theirs = create_block_mask(lambda b, h, q, k: mask.allows(q, k), None, None, tokens, tokens, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", [ChunkMask(3, 4, True), ChunkMask(3, 4, False)], ids=["teacher forcing", "causal"])
def test_flex_attention_computes_the_same(mask):
    """Forward only: on a CPU FlexAttention has no backward."""
    query, key, value = random_states(num_tokens(mask))
    block_mask = mask.block_mask(torch.device("cpu"))
    with torch.no_grad():
        flex = dispatch_attention_fn(query, key, value, attn_mask=block_mask, backend="flex")
    torch.testing.assert_close(flex, mask.dense(query, key, value, None), atol=1e-6, rtol=0)


# -- matrix products in bfloat16 on a CPU ----------------------------------------------------------------------------


@pytest.fixture
def dispatched(monkeypatch) -> list:
    """The backend of every call that went to diffusers' dispatcher instead of to plain matrix products."""
    calls = []

    def count(*args, backend=None, **kwargs):
        calls.append(backend)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    monkeypatch.setattr("longlive_diffusers.models.attend.dispatch_attention_fn", count)
    return calls


def test_matrix_products_are_as_near_to_float32_as_bfloat16_is(dispatched):
    """Scores, weights and the result are each rounded to 8 bits; values are of size 1."""
    query, key, value = random_states(64, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = attend(query, key, value)
    exact = textbook_attention(query.float(), key.float(), value.float())
    assert dispatched == []
    assert ours.dtype == torch.bfloat16
    error = (ours.float() - exact).abs()
    assert error.max() < 2**-6
    assert error.mean() < 2**-9


@pytest.mark.parametrize("score_bytes", [1, 500, 3000, 10_000])
@pytest.mark.parametrize("num_keys", [1, 7, 23])
def test_blocks_of_scores_make_no_difference(monkeypatch, score_bytes, num_keys):
    """From one query of one head at a time to all at once; 23 queries divide by no block."""
    query, key, value = random_states(23, dtype=torch.bfloat16)
    key, value = key[:, :num_keys], value[:, :num_keys]
    with torch.no_grad():
        at_once = attend(query, key, value)
        monkeypatch.setattr("longlive_diffusers.models.attend._SCORE_BYTES", score_bytes)
        in_blocks = attend(query, key, value)
    torch.testing.assert_close(in_blocks.float(), at_once.float(), atol=2**-7, rtol=0)


@pytest.mark.parametrize("num_scores", [1, 10_000])
def test_scratch_makes_no_difference(num_scores):
    """Whatever is in it, and where it is too small."""
    query, key, value = random_states(23, dtype=torch.bfloat16)
    scratch = torch.full((num_scores,), float("nan"), dtype=torch.bfloat16)
    with torch.no_grad():
        expected = attend(query, key, value)
        assert torch.equal(attend(query, key, value, scratch=scratch), expected)
    assert scratch.isnan().all() == (num_scores == 1)


def test_the_layers_of_a_cache_share_their_scratch():
    cache = tiny_cache(tiny_transformer(num_layers=3).bfloat16())
    assert cache[0].scratch is not None and cache[0].scratch is cache[1].scratch is cache[2].scratch
    assert tiny_cache(tiny_transformer())[0].scratch is None, "only products of bfloat16 on a CPU need it"


def test_queries_and_keys_may_differ_in_number():
    query, key, value = (states[:, :length] for states, length in zip(random_states(10), (3, 10, 10), strict=True))
    half = [states.bfloat16() for states in (query, key, value)]
    expected = textbook_attention(*half)
    with torch.no_grad():
        result = attend(*half)
    assert result.shape == (2, 3, HEADS, HEAD_DIM)
    torch.testing.assert_close(result.float(), expected.float(), atol=2**-6, rtol=0)


def test_float32_goes_to_the_dispatcher(dispatched):
    with torch.no_grad():
        attend(*random_states(4))
    assert dispatched == [None]


def test_training_goes_to_the_dispatcher_in_every_dtype(dispatched):
    attend(*random_states(4, dtype=torch.bfloat16))
    assert dispatched == [None]


def test_a_backend_that_was_asked_for_is_used(dispatched):
    query, key, value = random_states(4, dtype=torch.bfloat16)
    with torch.no_grad():
        attend(query, key, value, backend="native")
    assert dispatched == ["native"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["_native_math", "_native_flash"])
def test_a_kernel_of_pytorch_computes_what_diffusers_would_have_it_compute(backend, dtype, monkeypatch):
    states = [tensor.requires_grad_() for tensor in random_states(9, dtype=dtype)]
    expected = dispatch_attention_fn(*states, backend=backend)
    expected_gradients = torch.autograd.grad(expected.float().square().sum(), states)

    def forbidden(*args, **kwargs):
        raise AssertionError("this sets flags of the whole process, also for a VAE that decodes in another thread")

    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", forbidden)
    result = attend(*states, backend=backend)
    assert torch.equal(result, expected)
    gradients = torch.autograd.grad(result.float().square().sum(), states)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected_gradients, strict=True))
    with attention_backend(backend):
        assert torch.equal(attend(*states), expected)


@needs_gpu
@pytest.mark.parametrize("backend", ["_native_cudnn", "_native_flash", "_native_efficient", "_native_math"])
def test_a_kernel_of_pytorch_is_the_one_that_was_asked_for_on_a_gpu(backend):
    states = [tensor.to("cuda").requires_grad_() for tensor in random_states(64, dtype=torch.bfloat16)]
    expected = dispatch_attention_fn(*states, backend=backend)
    result = attend(*states, backend=backend)
    assert torch.equal(result, expected)
    result.float().square().sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in states)


def test_flex_attention_is_compiled_where_it_would_materialize_the_scores():
    assert needs_compilation(torch.device("cuda"))
    assert not needs_compilation(torch.device("cpu"))
    compiled = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        compiled.append(needs_compilation(torch.device("cuda")))
        return x + 1

    torch.compile(inside, backend="eager")(torch.zeros(1))
    assert compiled == [False], "code that is being compiled compiles it anyway"


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=2)
def test_flex_attention_is_compiled_for_every_length_of_the_history(monkeypatch):
    """Beyond its limit, 8 by itself, the compiler would call it uncompiled, which materializes the scores."""
    torch._dynamo.reset()
    compiled_for.cache_clear()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    monkeypatch.setattr(flex, "needs_compilation", lambda device: True)
    lengths = (8, 16, 24)
    for _ in range(2):  # the second time, the graphs are there
        for length in lengths:
            query, key = random_states(8)[0], random_states(length)[1]
            expected = scaled_dot_product_attention(*(states.transpose(1, 2) for states in (query, key, key)))
            torch.testing.assert_close(flex.flex_attend(query, key, key), expected.transpose(1, 2))
        assert counter.frame_count == len(lengths)
    compiled_for.cache_clear()


def test_gradients_of_many_chunks_are_summed_in_float32():
    """The first chunk is seen by all others: 64 terms, each smaller than a step of bfloat16 at their sum."""
    states = torch.zeros(1, 64, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    parts = prefixes(states, 1)
    sum(part.float().sum() / 128 * 1.01 for part in parts).backward()
    expected = torch.arange(64, 0, -1) * torch.tensor(1.01 / 128).bfloat16().float()
    torch.testing.assert_close(states.grad[0, :, 0, 0].float(), expected, atol=0, rtol=2**-8)


# -- cross-attention to the text -------------------------------------------------------------------------------------


@pytest.fixture
def cross_attention() -> WanAttention:
    torch.manual_seed(0)
    dim = HEADS * HEAD_DIM
    return WanAttention(dim, HEADS, HEAD_DIM, cross_attention_dim_head=HEAD_DIM, processor=LongLiveAttnProcessor())


def hidden_and_texts(mask: ChunkMask, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[B, tokens, dim]` and a text for each chunk `[B, chunks, 5, dim]`."""
    generator = torch.Generator().manual_seed(2)
    dim = HEADS * HEAD_DIM
    hidden_states = torch.randn(batch, num_tokens(mask), dim, generator=generator)
    return hidden_states, torch.randn(batch, mask.num_chunks, 5, dim, generator=generator)


@every_mask
def test_each_chunk_reads_its_own_text_in_both_halves(cross_attention, mask):
    hidden_states, texts = hidden_and_texts(mask)
    result = cross_attention(hidden_states, texts, mask)
    chunks = zip(hidden_states.split(mask.chunk_tokens, dim=1), list(range(mask.num_chunks)) * 2, strict=False)
    alone = [cross_attention(chunk, texts[:, number], mask) for chunk, number in chunks]
    torch.testing.assert_close(result, torch.cat(alone, dim=1), atol=1e-6, rtol=0)


@every_mask
def test_one_text_for_all_is_the_same_text_for_each(cross_attention, mask):
    hidden_states, texts = hidden_and_texts(mask)
    shared = texts[:, :1].expand(-1, mask.num_chunks, -1, -1)
    expected = cross_attention(hidden_states, texts[:, 0], mask)
    torch.testing.assert_close(cross_attention(hidden_states, shared, mask), expected, atol=1e-6, rtol=0)


def test_the_layer_cache_stands_in_for_the_text(cross_attention):
    """Its keys and values are kept at the first forward of a stream; later ones need no text at all."""
    mask = ChunkMask(num_chunks=1, chunk_tokens=6, has_clean=False)
    hidden_states, texts = hidden_and_texts(mask)
    cache = LayerKVCache((2, HEADS, 1, 6, HEAD_DIM), 0, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        expected = cross_attention(hidden_states, texts[:, 0], mask)
        first = cross_attention(hidden_states, texts[:, 0], layer_cache=cache)
        second = cross_attention(hidden_states, None, layer_cache=cache)
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)
    assert torch.equal(second, first)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_attention_in_bfloat16_on_a_cpu_compiles_to_machine_code():
    """Up to torch 2.13, Inductor fails on a custom operator that may write to an argument, where it is None."""
    torch._dynamo.reset()
    query, key, value = (torch.randn(1, tokens, 2, 8).bfloat16() for tokens in (6, 10, 10))
    with torch.no_grad():
        compiled = torch.compile(attend, fullgraph=True)(2 * query, key, value)
        assert torch.equal(compiled, attend(2 * query, key, value))
