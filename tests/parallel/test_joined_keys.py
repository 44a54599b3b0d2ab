"""What a noisy chunk sees is a concatenation, of which the backward keeps the parts alone: the same gradients, in
memory that grows with the number of chunks, not with its square."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from longlive_diffusers.models.chunk_mask import ChunkMask
from tests.support.storage_watch import StorageWatch


CHUNK_TOKENS, HEADS, HEAD_DIM = 4, 2, 8
CHUNK_BYTES = CHUNK_TOKENS * HEADS * HEAD_DIM * 4


@pytest.fixture
def keep_concatenations(monkeypatch):
    def switch():
        monkeypatch.setattr("longlive_diffusers.models.attend.save_recipes", lambda *made: nullcontext())

    return switch


def new_leaves(mask: ChunkMask) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = mask.num_halves * mask.num_chunks * mask.chunk_tokens
    return [torch.randn(1, tokens, HEADS, HEAD_DIM, generator=generator).requires_grad_() for _ in range(3)]


def attend_plainly(mask: ChunkMask, leaves: list[torch.Tensor]) -> torch.Tensor:
    return mask.dense(*leaves, None)


def attend_checkpointed(mask: ChunkMask, leaves: list[torch.Tensor]) -> torch.Tensor:
    return checkpoint(mask.dense, *leaves, None, use_reentrant=False)


def held_for_backward(attend, num_chunks: int, num_ranks: int = 1) -> float:
    """Bytes that live from forward to backward, the result's own aside, in units of one chunk's keys."""
    mask = ChunkMask(num_chunks, CHUNK_TOKENS, True, num_ranks)
    leaves = new_leaves(mask)
    with StorageWatch(ignored=leaves) as watch:
        output = attend(mask, leaves)
    return (watch.alive_bytes() - output.untyped_storage().nbytes()) / CHUNK_BYTES


def gradients(attend, mask: ChunkMask) -> list[torch.Tensor]:
    leaves = new_leaves(mask)
    output = attend(mask, leaves)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weight).sum().backward()
    return [leaf.grad for leaf in leaves]


every_way = pytest.mark.parametrize("attend", [attend_plainly, attend_checkpointed], ids=["plainly", "checkpointed"])
ranks = pytest.mark.parametrize("num_ranks", [1, 2])


@every_way
@ranks
@pytest.mark.parametrize("num_chunks", [2, 6])
def test_gradients_are_the_same_bits(keep_concatenations, attend, num_chunks, num_ranks):
    mask = ChunkMask(num_chunks, CHUNK_TOKENS, True, num_ranks)
    found = gradients(attend, mask)
    keep_concatenations()
    expected = gradients(attend_plainly, mask)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@ranks
def test_what_is_held_grows_with_the_number_of_chunks(keep_concatenations, num_ranks):
    """
    The inputs aside, held are the outputs of 2n chunks with the sums of their softmax, 1/8 of that, and for several
    ranks the gathered clean keys and values. The concatenations, of keys and of values, would be 1 + ... + (n - 1)
    chunks of past and n - 1 chunks with it.
    """
    counts = [2, 4, 8, 16]
    held = [held_for_backward(attend_plainly, count, num_ranks) for count in counts]
    per_chunk = 2 * (1 + 1 / HEAD_DIM) + (2 if num_ranks > 1 else 0)
    assert held == pytest.approx([count * per_chunk for count in counts])

    keep_concatenations()
    plain = [held_for_backward(attend_plainly, count, num_ranks) for count in counts]
    joined = [count * (count - 1) + 2 * (count - 1) for count in counts]
    assert plain == pytest.approx([a + b for a, b in zip(held, joined, strict=True)])


@ranks
def test_checkpointing_still_holds_nothing(num_ranks):
    """The hooks that watch for concatenations must not take the other tensors away from those of the checkpoint."""
    assert [held_for_backward(attend_checkpointed, count, num_ranks) for count in (2, 8)] == [0, 0]


def held_after_recomputing(num_chunks: int) -> float:
    """As `held_for_backward`, of a checkpoint in its backward, after it has computed the forward again."""
    mask = ChunkMask(num_chunks, CHUNK_TOKENS, True)
    leaves, alive = new_leaves(mask), []

    def attend(*states):
        output = mask.dense(*states, None)
        alive.append(watch.alive_bytes() - output.untyped_storage().nbytes())
        return output

    with StorageWatch(ignored=leaves) as watch, set_checkpoint_early_stop(False):
        output = checkpoint(attend, *leaves, use_reentrant=False)
        first_output = output.untyped_storage().nbytes()
        output.backward(torch.ones(1).expand(output.shape))
    _, recomputed = alive
    return (recomputed - first_output) / CHUNK_BYTES


def test_what_a_checkpoint_computes_again_grows_with_the_number_of_chunks(keep_concatenations):
    counts = [2, 4, 8, 16]
    held = [held_after_recomputing(count) for count in counts]
    growth = [(b - a) / (n - m) for (a, m), (b, n) in pairwise(zip(held, counts, strict=True))]
    assert growth == pytest.approx([growth[0]] * 3, rel=0.01), held

    keep_concatenations()
    plain = [held_after_recomputing(count) for count in counts]
    joined = [count * (count - 1) + 2 * (count - 1) for count in counts]
    assert plain == pytest.approx([a + b for a, b in zip(held, joined, strict=True)])


def test_the_hooks_around_see_parts_and_not_concatenations():
    """As with `save_on_cpu`: whoever packs what is saved for backward packs the parts, and gets them back."""
    mask = ChunkMask(3, CHUNK_TOKENS, True)
    packed, unpacked = [], []
    leaves = new_leaves(mask)

    def pack(tensor):
        packed.append(tensor.shape[:2])
        return tensor.clone()

    def unpack(tensor):
        unpacked.append(tensor.shape[:2])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = mask.dense(*leaves, None)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weight).sum().backward()
    assert sorted(packed) == sorted(unpacked)
    # [B, tokens, ...], of keys and of values: the past of chunk 2; that of chunk 1, and both chunks' own
    assert packed.count((1, 2 * CHUNK_TOKENS)) == 2
    assert packed.count((1, CHUNK_TOKENS)) == 2 * 3
    assert all(
        torch.equal(leaf.grad, other) for leaf, other in zip(leaves, gradients(attend_plainly, mask), strict=True)
    )


def test_a_backward_can_be_run_twice():
    mask = ChunkMask(3, CHUNK_TOKENS, True)
    leaves = new_leaves(mask)
    output = mask.dense(*leaves, None)
    output.sum().backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    output.sum().backward()
    assert all(torch.equal(leaf.grad, 2 * gradient) for leaf, gradient in zip(leaves, first, strict=True))


def test_transforms_that_forbid_hooks_work():
    mask = ChunkMask(2, CHUNK_TOKENS, True)
    leaves = new_leaves(mask)
    mask.dense(*leaves, None).sum().backward()
    detached = [leaf.detach() for leaf in leaves]
    found = torch.func.grad(lambda query: mask.dense(query, *detached[1:], None).sum())(detached[0])
    torch.testing.assert_close(found, leaves[0].grad)
