"""Pixel frames, latent frames and chunks: what they are counted in agrees with how Wan's VAE makes them."""

import pytest

from longlive_diffusers import chunks_to_cover, latent_frames, pixel_frames, whole_chunks


def test_the_first_latent_frame_is_one_frame_and_every_other_four():
    assert [pixel_frames(count) for count in range(5)] == [0, 1, 5, 9, 13]
    assert [pixel_frames(count, opens_video=False) for count in range(4)] == [0, 4, 8, 12]
    assert pixel_frames(8 * 2) == 61
    assert pixel_frames(3 * 2, opens_video=False) == 24
    assert pixel_frames(3, temporal_scale=8) == 17


@pytest.mark.parametrize("opens_video", [True, False])
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_latent_frames_are_the_inverse_rounded_down(scale, opens_video):
    options = {"opens_video": opens_video, "temporal_scale": scale}
    for frames in range(100):
        count = latent_frames(frames, **options)
        assert pixel_frames(count, **options) <= frames < pixel_frames(count + 1, **options)
        assert latent_frames(pixel_frames(count, **options), **options) == count


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8])
def test_chunks_are_filled_or_covered(chunk_size):
    for frames in range(1, 200):
        filled, covering = whole_chunks(frames, chunk_size), chunks_to_cover(frames, chunk_size)
        assert pixel_frames(filled * chunk_size) <= frames <= pixel_frames(covering * chunk_size)
        assert pixel_frames((filled + 1) * chunk_size) > frames > pixel_frames((covering - 1) * chunk_size)
    assert whole_chunks(63, 8, opens_video=False) == 1 and whole_chunks(64, 8, opens_video=False) == 2
