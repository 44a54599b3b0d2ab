"""Each rank encodes its own part of the video: exactly, where the halo covers the encoder's reach."""

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKLWan

from longlive_diffusers import StreamingEncoder
from longlive_diffusers.parallel import FrameLayout, RawWindow, encode_shard, raw_window
from tests.support.checks import assert_raises
from tests.support.tiny_vae import tiny_vae


FRAMES = 24  # latent
ENOUGH = 19  # latents that the tiny encoder looks back


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return tiny_vae()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    shape = (1, 3, 1 + 4 * (FRAMES - 1), 32, 32)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def whole(vae, pixels) -> torch.Tensor:
    return StreamingEncoder(vae).encode(pixels)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def encode_in_shards(vae, pixels, num_ranks: int, halo: int, chunk_size: int = 1) -> torch.Tensor:
    layout = FrameLayout(FRAMES, num_ranks, chunk_size)
    return torch.cat([encode_shard(vae, pixels, layout, rank, halo) for rank in range(num_ranks)], dim=2)


# -- which raw frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "halo", "expected"),
    [
        (0, 2, 28, (0, 5, 0)),  # the start of the video: no halo, no pseudo latent
        (2, 4, 28, (0, 13, 2)),  # a halo longer than the past: all of it
        (2, 4, 2, (0, 13, 2)),
        (2, 4, 1, (0, 13, 2)),  # a halo from latent 1: its pseudo latent is latent 0 itself
        (2, 4, 0, (4, 13, 1)),  # no halo: the last raw frame before, for the pseudo latent
        (4, 6, 2, (4, 21, 3)),
        (32, 48, 28, (12, 189, 29)),
    ],
)
def test_raw_windows(first, last, halo, expected):
    window = RawWindow.of_latents(first, last, halo)
    assert (window.start, window.stop, window.num_dropped) == expected
    assert (window.num_frames - 1) // 4 + 1 == window.num_dropped + last - first
    assert window.stop == 1 + 4 * (last - 1), "the last raw frame is that of the last latent"


def test_windows_grow_with_the_ranks_until_the_halo_is_full():
    layout = FrameLayout(64, 4, 8)
    assert [raw_window(layout, rank) for rank in range(4)] == [
        RawWindow(0, 61, 0),
        RawWindow(0, 125, 16),
        RawWindow(12, 189, 29),
        RawWindow(76, 253, 29),
    ]


# -- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("halo", [ENOUGH, 28])
def test_shards_are_the_whole(vae, pixels, whole, num_ranks, halo):
    found = encode_in_shards(vae, pixels, num_ranks, halo)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)


def test_parts_of_any_length_are_the_whole(vae, pixels, whole):
    """Unequal ones too, though the ranks of a group do not have them."""
    first = 0
    for length in (1, 5, 15, 3):
        window = RawWindow.of_latents(first, first + length, ENOUGH)
        with torch.no_grad():
            latents = vae.encode(pixels[:, :, window.start : window.stop]).latent_dist.mode()
        found = latents[:, :, window.num_dropped :]
        torch.testing.assert_close(found, whole[:, :, first : first + length], atol=1e-6, rtol=0)
        first += length


@pytest.mark.parametrize("rank", range(3))
def test_the_window_alone_will_do(vae, pixels, rank):
    layout = FrameLayout(FRAMES, 3, 4)
    window = raw_window(layout, rank, 3)
    own = encode_shard(vae, pixels[:, :, window.start : window.stop], layout, rank, 3)
    assert own.shape == (1, 8, 8, 2, 2)
    assert torch.equal(own, encode_shard(vae, pixels, layout, rank, 3))


def test_the_error_vanishes_as_the_halo_grows(vae, pixels, whole):
    """Printed for the last of six ranks (`pytest -s`)."""
    layout = FrameLayout(FRAMES, 6, 4)
    expected = layout.shard_latents(whole, 5)
    halos = [0, 1, 2, 4, 8, 12, 16, ENOUGH]
    errors = [relative_error(encode_shard(vae, pixels, layout, 5, halo), expected) for halo in halos]
    print(
        "\nhalo  relative error",
        *(f"{halo:4}  {error:.1e}" for halo, error in zip(halos, errors, strict=True)),
        sep="\n",
    )
    assert errors[0] > 0.1, "without a halo, a rank's part begins like a video of its own"
    assert all(after < before / 1.3 for before, after in pairwise(errors))
    assert errors[-1] < 1e-6


# -- bad input -------------------------------------------------------------------------------------------------------


def test_other_numbers_of_frames_are_refused(vae, pixels):
    layout = FrameLayout(FRAMES, 2, 2)
    window = raw_window(layout, 1, 2)
    assert_raises(
        lambda: encode_shard(vae, pixels[:, :, :20], layout, 1, 2), window.num_frames, 93, "(1, 3, 20, 32, 32)"
    )


def test_windows_of_nothing_are_refused():
    assert_raises(lambda: RawWindow.of_latents(4, 4, 2), 4)
    assert_raises(lambda: RawWindow.of_latents(-1, 4, 2), -1, 4)
    assert_raises(lambda: RawWindow.of_latents(0, 4, -2), -2)
