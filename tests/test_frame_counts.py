"""Pixel frames, latent frames and chunks: what they are counted in agrees with how Wan's VAE makes them."""

import numpy as np
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


NOT_COUNTS = (-1, -9, 2.5, 3.0, True, "3", None, float("nan"), [3])
COUNTED = {
    "num_latent_frames": [pixel_frames],
    "num_pixel_frames": [latent_frames, whole_chunks, chunks_to_cover],
    "chunk_size": [whole_chunks, chunks_to_cover],
    "temporal_scale": [pixel_frames, latent_frames, whole_chunks, chunks_to_cover],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in COUNTED for value in NOT_COUNTS])
def test_what_cannot_be_counted_is_refused(name, value):
    for function in COUNTED[name]:
        first = "num_latent_frames" if function is pixel_frames else "num_pixel_frames"
        counts = {first: 9, **({"chunk_size": 2} if function in (whole_chunks, chunks_to_cover) else {}), name: value}
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least [01], got ") as raised:
            function(**counts)
        assert repr(value) in str(raised.value)


def test_chunks_and_scales_of_nothing_are_refused():
    for call in (
        lambda: chunks_to_cover(125, 0),
        lambda: whole_chunks(125, 0),
        lambda: chunks_to_cover(0, 8),
        lambda: pixel_frames(3, temporal_scale=0),
        lambda: latent_frames(9, temporal_scale=0),
    ):
        with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
            call()


def test_counts_may_be_numpys():
    assert pixel_frames(np.int64(3)) == 9 and latent_frames(np.int32(9)) == 3
    assert whole_chunks(np.int64(63), np.int64(8)) == 2 and chunks_to_cover(np.int64(62), 8) == 3
    assert pixel_frames(0) == latent_frames(0) == whole_chunks(0, 8) == 0
