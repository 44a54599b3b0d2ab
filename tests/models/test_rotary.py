"""Rotary position embedding: Wan's own at the positions that Wan knows, and exact at all others."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed

from longlive_diffusers.models.attention import LongLiveAttnProcessor
from longlive_diffusers.models.chunk_mask import ChunkMask
from longlive_diffusers.models.rotary import apply_rotary, axis_frequencies, rotary_embedding


HEIGHT, WIDTH = 2, 3  # tokens of a frame
HEAD_DIMS = [12, 32, 128]  # of these only 12 is shared out evenly among the axes; 128 is that of the 5B model


def wan_rotary(num_frames: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' table for frames 0, 1, 2, ..., cosine and sine `[1, tokens, 1, head_dim]`."""
    latents = torch.empty(1, 8, num_frames, 2 * HEIGHT, 2 * WIDTH)
    return WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(latents)


def states(frames: int, head_dim: int, batch: int = 1, heads: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames * HEIGHT * WIDTH, heads, head_dim, generator=generator)


def rotated(hidden_states: torch.Tensor, positions) -> torch.Tensor:
    positions = torch.tensor(positions, dtype=torch.float64)
    return apply_rotary(hidden_states, rotary_embedding(positions, HEIGHT, WIDTH, hidden_states.shape[-1]))


def angles_by_hand(position: float, row: int, column: int, head_dim: int) -> list[float]:
    """Of one token, from the definition, in Python's float64."""
    spatial = 2 * (head_dim // 6)
    axes = [(position, head_dim - 2 * spatial), (row, spatial), (column, spatial)]
    return [value * 10000.0 ** (-2 * pair / channels) for value, channels in axes for pair in range(channels // 2)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_whole_positions_are_those_of_diffusers_to_the_last_bit(head_dim):
    cos, sin = wan_rotary(1024, head_dim)
    rotary = rotary_embedding(torch.arange(1024), HEIGHT, WIDTH, head_dim)
    assert rotary.shape == (1, 1024 * HEIGHT * WIDTH, 1, head_dim // 2, 2)
    assert rotary.dtype == torch.float32
    # diffusers holds each pair's value twice.
    for ours, theirs in ((rotary[..., 0], cos), (rotary[..., 1], sin)):
        assert torch.equal(ours, theirs[..., 0::2])
        assert torch.equal(ours, theirs[..., 1::2])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_applied_in_attention_it_gives_what_diffusers_gives(head_dim):
    """The same projections, once with Wan's processor and once with ours over a single chunk, which sees itself."""
    torch.manual_seed(0)
    attn = WanAttention(2 * head_dim, heads=2, dim_head=head_dim, processor=WanAttnProcessor())
    hidden_states = torch.randn(2, 5 * HEIGHT * WIDTH, 2 * head_dim)
    expected = attn(hidden_states, None, None, wan_rotary(5, head_dim))

    attn.set_processor(LongLiveAttnProcessor())
    mask = ChunkMask(num_chunks=1, chunk_tokens=5 * HEIGHT * WIDTH, has_clean=False)
    rotary = rotary_embedding(torch.arange(5), HEIGHT, WIDTH, head_dim)
    torch.testing.assert_close(attn(hidden_states, None, mask, rotary), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("position", [0.0, 2.5, 12.25, -3.0, 170 + 1 / 3, 1023.0, 100_000.5, 1e6])
def test_any_real_position_has_the_angle_of_the_definition(position, head_dim):
    """A million latent frames are 46 hours of video; float32 angles would there be wrong in their second digit."""
    rotary = rotary_embedding(torch.tensor([position], dtype=torch.float64), HEIGHT, WIDTH, head_dim)
    rotary = rotary.view(HEIGHT, WIDTH, head_dim // 2, 2)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            expected = [(math.cos(a), math.sin(a)) for a in angles_by_hand(position, row, column, head_dim)]
            half_a_unit_in_the_last_place = 2**-25 + 1e-9
            error = (rotary[row, column].double() - torch.tensor(expected, dtype=torch.float64)).abs().max()
            assert error <= half_a_unit_in_the_last_place


def test_whole_positions_may_be_integers():
    by_integer = rotary_embedding(torch.tensor([3, 1_000_000]), HEIGHT, WIDTH, 32)
    by_float = rotary_embedding(torch.tensor([3.0, 1e6], dtype=torch.float64), HEIGHT, WIDTH, 32)
    assert torch.equal(by_integer, by_float)


def test_only_distances_matter_however_far_the_video_has_come():
    query, key = states(1, 32, seed=1), states(1, 32, seed=2)
    products = [
        (rotated(query, [start + 3.5]) * rotated(key, [start])).sum(dim=-1) for start in (0.0, 7.25, 1000.0, 1e6)
    ]
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], atol=1e-5, rtol=0)


def test_each_row_of_a_batch_may_have_its_own_positions():
    """As where the videos of a batch cut to a new shot at different times."""
    positions = [[0.0, 1.0, 2.0], [0.0, 9.0, 10.0]]
    hidden_states = states(3, 32, batch=2)
    together = rotated(hidden_states, positions)
    for row in range(2):
        assert torch.equal(together[row : row + 1], rotated(hidden_states[row : row + 1], positions[row]))
    assert torch.equal(together[0, : HEIGHT * WIDTH], rotated(hidden_states, [0.0, 1.0, 2.0])[0, : HEIGHT * WIDTH])
    assert not torch.equal(together[0], together[1])


def test_one_row_of_positions_serves_the_whole_batch():
    hidden_states = states(2, 32, batch=3)
    assert torch.equal(rotated(hidden_states, [4.0, 5.0]), rotated(hidden_states, [[4.0, 5.0]] * 3))


def test_a_rotation_keeps_lengths_and_can_be_undone():
    hidden_states = states(2, 32)
    there = rotated(hidden_states, [11.0, 12.5])
    pairs, rotated_pairs = (x.unflatten(-1, (-1, 2)).norm(dim=-1) for x in (hidden_states, there))
    torch.testing.assert_close(rotated_pairs, pairs, atol=1e-6, rtol=0)

    rotary = rotary_embedding(torch.tensor([11.0, 12.5]), HEIGHT, WIDTH, 32)
    backwards = rotary * torch.tensor([1.0, -1.0])  # the conjugate: the same angle, backwards
    torch.testing.assert_close(apply_rotary(there, backwards), hidden_states, atol=1e-6, rtol=0)


def test_position_nought_changes_nothing_at_the_first_token():
    hidden_states = states(1, 32)
    assert torch.equal(rotated(hidden_states, [0.0])[:, 0], hidden_states[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_float32_and_rounded_once(dtype):
    hidden_states = states(2, 32).to(dtype)
    result = rotated(hidden_states, [100.0, 101.0])
    assert result.dtype == dtype
    assert torch.equal(result, rotated(hidden_states.float(), [100.0, 101.0]).to(dtype))


def test_the_base_of_the_frequencies_can_be_chosen():
    assert axis_frequencies(4, 100.0).tolist() == [1.0, 0.1]
    slow, fast = (rotary_embedding(torch.tensor([1.0]), 1, 1, 12, theta=theta)[0, 0, 0, 1, 1] for theta in (1e4, 1e2))
    assert fast == pytest.approx(math.sin(0.1))
    assert slow == pytest.approx(math.sin(0.01))
