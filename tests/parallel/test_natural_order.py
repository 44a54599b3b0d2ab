"""Attention over the tokens of several ranks in natural order, `[r0 clean, r0 noisy, r1 clean, ...]`, and how a
forward with `sp_mesh` is refused."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.distributed.fake_pg import FakeStore

from longlive_diffusers.models.chunk_mask import ChunkMask
from longlive_diffusers.parallel import gather_heads, scatter_heads
from tests.support.checks import assert_raises
from tests.support.group_mean import group_mean
from tests.support.tiny_pipeline import CHUNK_SIZE, random_inputs, teacher_forcing_inputs, tiny_cache, tiny_transformer


MASKS = [
    ChunkMask(num_chunks, chunk_tokens, has_clean, num_ranks)
    for has_clean in (False, True)
    for num_chunks, chunk_tokens, num_ranks in [(2, 1, 2), (4, 3, 2), (4, 3, 4), (6, 2, 3), (6, 2, 2)]
]
every_mask = pytest.mark.parametrize(
    "mask",
    MASKS,
    ids=lambda m: f"{m.num_chunks}x{m.chunk_tokens} {'both halves' if m.has_clean else 'noisy'} {m.num_ranks} ranks",
)


def num_tokens(mask: ChunkMask) -> int:
    return mask.num_halves * mask.num_chunks * mask.chunk_tokens


def table(mask: ChunkMask) -> torch.Tensor:
    """`allows` for all tokens, bool `[queries, keys]`."""
    tokens = torch.arange(num_tokens(mask))
    return mask.allows(tokens[:, None], tokens[None, :])


def natural_order(mask: ChunkMask) -> torch.Tensor:
    """Where each token in natural order stands in `[clean; noisy]`."""
    clean_then_noisy = torch.arange(num_tokens(mask)).view(mask.num_halves, mask.num_ranks, -1)
    return clean_then_noisy.transpose(0, 1).flatten()


def random_states(mask: ChunkMask) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, num_tokens(mask), 2, 8, generator=generator) for _ in range(4)]


def test_table_of_two_ranks():
    """Rank 0 has C0 N0, rank 1 C1 N1: the table of [C0 C1 N0 N1], in another order."""
    #    keys:  C0 N0 C1 N1
    expected = [
        [1, 0, 0, 0],  # C0
        [0, 1, 0, 0],  # N0
        [1, 0, 1, 0],  # C1
        [1, 0, 0, 1],  # N1
    ]
    assert table(ChunkMask(2, 1, True, num_ranks=2)).int().tolist() == expected


@every_mask
def test_the_rule_in_natural_order_is_the_permuted_rule(mask):
    single = table(ChunkMask(mask.num_chunks, mask.chunk_tokens, mask.has_clean))
    order = natural_order(mask)
    assert torch.equal(table(mask), single[order][:, order])


@every_mask
def test_flex_attention_gets_the_rule_in_natural_order(mask):
    block_mask = mask.block_mask(torch.device("cpu"))
    index = torch.arange(num_tokens(mask))
    assert torch.equal(block_mask.mask_mod(0, 0, index[:, None], index[None, :]), table(mask))


@every_mask
def test_dense_is_attention_under_the_rule_with_its_gradients(mask):
    *inputs, weight = random_states(mask)
    leaves, reference = ([states.clone().requires_grad_() for states in inputs] for _ in range(2))
    found = mask.dense(*leaves, None)
    heads_first = (states.transpose(1, 2) for states in reference)
    expected = scaled_dot_product_attention(*heads_first, attn_mask=table(mask)).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip(leaves, reference, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=0)


@every_mask
def test_dense_in_natural_order_is_dense_reordered(mask):
    """Bit for bit: each chunk's queries meet the same keys in the same order."""
    order = natural_order(mask)
    query, key, value, _ = random_states(mask)
    single = ChunkMask(mask.num_chunks, mask.chunk_tokens, mask.has_clean)
    expected = single.dense(query, key, value, None)[:, order]
    assert torch.equal(mask.dense(query[:, order], key[:, order], value[:, order], None), expected)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def world_of_four():
    """This process believes to be the first of four, which never answer."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def model():
    return tiny_transformer(num_attention_heads=4)


@pytest.fixture
def mesh(world_of_four):
    return init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))


def test_heads_that_do_not_divide_are_refused(mesh):
    model = tiny_transformer(num_attention_heads=6)
    assert_raises(lambda: model(**teacher_forcing_inputs(), sp_mesh=mesh), 6, 4)
    assert_raises(lambda: scatter_heads(torch.zeros(1, 3, 6, 8), mesh), 6, 4)
    assert_raises(lambda: gather_heads(torch.zeros(1, 6, 6, 8), mesh), 6, 4)


def test_a_mesh_of_two_dimensions_is_refused(world_of_four, model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    assert_raises(lambda: model(**teacher_forcing_inputs(), sp_mesh=mesh), "(2, 2)")


def test_a_stream_is_not_split(mesh, model):
    cache = tiny_cache(model)
    cache.begin_chunk(CHUNK_SIZE)
    assert_raises(
        lambda: model(**random_inputs(CHUNK_SIZE), kv_cache=cache, sp_mesh=mesh), "`kv_cache`", "`sp_mesh`", 4
    )


def test_a_rank_holds_whole_chunks(mesh, model):
    inputs = random_inputs(3) | {"clean_hidden_states": random_inputs(3, seed=1)["hidden_states"]}
    assert_raises(lambda: model(**inputs, sp_mesh=mesh), 3, CHUNK_SIZE)


def test_texts_are_those_of_the_ranks_own_chunks(mesh, model):
    inputs = teacher_forcing_inputs()
    texts = inputs["encoder_hidden_states"][:, None].expand(-1, 8, -1, -1)
    assert_raises(lambda: model(**inputs | {"encoder_hidden_states": texts}, sp_mesh=mesh), 2, "(1, 8, 8, 16)")


# -- the mean loss, of one process -----------------------------------------------------------------------------------


def test_the_mean_of_one_process_is_the_mean():
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    mean = group_mean(losses.sum(), 3)
    mean.backward()
    assert mean.item() == 3
    torch.testing.assert_close(losses.grad, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_the_mean_of_nothing_is_nought(count):
    losses = torch.ones(3, requires_grad=True)
    mean = group_mean((losses * 0).sum(), count)
    mean.backward()
    assert mean.item() == 0 and not losses.grad.any()
