"""Whose frames are whose, and how much work they are."""

import pytest
import torch

from longlive_diffusers.models.chunk_mask import ChunkMask
from longlive_diffusers.parallel import FrameLayout, check_heads
from tests.support.checks import assert_raises
from tests.support.rank_work import RankWork, balanced_work, imbalance, plain_work


# frames, ranks, chunk size
LAYOUTS = [(8, 1, 2), (8, 2, 2), (8, 4, 2), (12, 3, 2), (12, 3, 4), (5, 5, 1), (64, 4, 8), (96, 3, 8)]
every_layout = pytest.mark.parametrize("layout", [FrameLayout(*sizes) for sizes in LAYOUTS], ids=str)


@every_layout
def test_ranks_hold_all_frames_and_chunks_in_order(layout):
    ranks = range(layout.num_ranks)
    frames = [frame for rank in ranks for frame in range(layout.num_frames)[layout.frames_of(rank)]]
    chunks = [chunk for rank in ranks for chunk in range(layout.num_chunks)[layout.chunks_of(rank)]]
    assert frames == list(range(layout.num_frames))
    assert chunks == list(range(layout.num_chunks))
    assert layout.frames_per_rank == layout.chunks_per_rank * layout.chunk_size


@every_layout
def test_shards_put_together_are_the_clip(layout):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, layout.num_frames, 4, 5, generator=generator)
    times = torch.randn(2, layout.num_frames, generator=generator)
    texts = torch.randn(2, layout.num_chunks, 7, 6, generator=generator)
    ranks = range(layout.num_ranks)
    assert torch.equal(torch.cat([layout.shard_latents(latents, rank) for rank in ranks], dim=2), latents)
    assert torch.equal(torch.cat([layout.shard_frames(times, rank) for rank in ranks], dim=1), times)
    assert torch.equal(torch.cat([layout.shard_chunks(texts, rank) for rank in ranks], dim=1), texts)


@pytest.mark.parametrize("sizes", [(9, 2, 2), (10, 4, 2), (12, 2, 4), (8, 3, 2), (30, 4, 8)])
def test_frames_that_do_not_divide_are_refused(sizes):
    frames, ranks, chunk_size = sizes
    assert_raises(lambda: FrameLayout(*sizes), frames, ranks, chunk_size, ranks * chunk_size)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (8, 0, 2), (8, 2, 0), (8, -2, 2)])
def test_a_layout_of_nothing_is_refused(sizes):
    assert_raises(lambda: FrameLayout(*sizes), *sizes)


@pytest.mark.parametrize("rank", [-1, 4])
def test_there_are_no_other_ranks(rank):
    assert_raises(lambda: FrameLayout(8, 4, 2).frames_of(rank), 3, rank)


def test_tensors_of_another_length_are_refused():
    layout = FrameLayout(8, 2, 2)
    assert_raises(lambda: layout.shard_latents(torch.zeros(1, 8, 6, 2, 2), 0), 8, "(1, 8, 6, 2, 2)")
    assert_raises(lambda: layout.shard_frames(torch.zeros(1, 4), 0), 8, "(1, 4)")
    assert_raises(lambda: layout.shard_frames(torch.zeros(8), 0), 8, "(8,)")
    assert_raises(lambda: layout.shard_chunks(torch.zeros(1, 8, 5, 3), 0), 4, "(1, 8, 5, 3)")


def test_heads_divide_or_are_refused():
    check_heads(24, 8)
    assert_raises(lambda: check_heads(24, 5), 24, 5)


# -- work ------------------------------------------------------------------------------------------------------------


def count_pairs(layout: FrameLayout, frame_tokens: int, num_ranks_of_mask: int) -> list[int]:
    """Pairs that the mask allows to each of N equal runs of queries, by the rule itself."""
    mask = ChunkMask(layout.num_chunks, layout.chunk_size * frame_tokens, True, num_ranks_of_mask)
    tokens = torch.arange(2 * layout.num_frames * frame_tokens)
    allowed = mask.allows(tokens[:, None], tokens[None, :])
    return [int(rows.sum()) for rows in allowed.chunk(layout.num_ranks)]


@every_layout
def test_pairs_are_those_of_the_mask(layout):
    balanced, plain = balanced_work(layout, 1), plain_work(layout, 1)
    assert [work.pairs for work in balanced] == count_pairs(layout, 1, layout.num_ranks)
    assert [work.pairs for work in plain] == count_pairs(layout, 1, 1)


@every_layout
def test_balanced_ranks_have_equal_tokens_losses_and_frames(layout):
    frame_tokens, own = 6, layout.frames_per_rank
    for work in balanced_work(layout, frame_tokens):
        assert (work.tokens, work.loss_tokens, work.frames) == (2 * own * frame_tokens, own * frame_tokens, own)


@every_layout
def test_both_ways_do_the_same_work_in_all(layout):
    balanced, plain = balanced_work(layout, 4), plain_work(layout, 4)
    for name in ("tokens", "loss_tokens", "pairs"):
        assert sum(getattr(work, name) for work in balanced) == sum(getattr(work, name) for work in plain)


def test_a_plain_split_gives_the_loss_to_half_of_the_ranks_and_every_frame_to_two():
    plain = plain_work(FrameLayout(64, 4, 8), 10)
    assert [work.loss_tokens for work in plain] == [0, 0, 320, 320]
    assert [work.tokens for work in plain] == [320] * 4
    assert [work.frames for work in plain] == [32] * 4
    assert imbalance(work.loss_tokens for work in plain) == 2


def test_the_middle_rank_of_an_odd_number_has_some_of_both_in_a_plain_split():
    assert plain_work(FrameLayout(6, 3, 2), 1) == [
        RankWork(tokens=4, loss_tokens=0, pairs=(1 + 2) * 4, frames=4),
        RankWork(tokens=4, loss_tokens=2, pairs=(3 + 1) * 4, frames=4),
        RankWork(tokens=4, loss_tokens=4, pairs=(2 + 3) * 4, frames=4),
    ]


def test_imbalance():
    assert imbalance([3, 3, 3]) == 1
    assert imbalance([0, 0, 6, 2]) == 3
