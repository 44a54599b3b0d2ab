"""What frames are sent as: each is complete by itself, and joined they are the video."""

import io
import struct

import av
import numpy as np
import pytest

from longlive_diffusers.serve.encoders import FragmentEncoder, codec_name, frame_encoder


def moving_shape(num_frames: int, height: int, width: int) -> np.ndarray:
    """A bright square that moves to the right over a gradient, `[F, H, W, 3]`."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 200, width, dtype=np.uint8)
    for index in range(num_frames):
        frames[index, height // 4 : height // 2, index : index + width // 4, 1] = 255
    return frames


def boxes(data: bytes) -> list[str]:
    """The names of the boxes at the top of a piece of an mp4."""
    names = []
    while data:
        (length,) = struct.unpack(">I", data[:4])
        names.append(data[4:8].decode())
        data = data[length:]
    return names


@pytest.mark.parametrize("height, width", [(64, 64), (48, 96), (704, 1280)])
def test_each_frame_is_a_fragment_that_is_there_at_once(height: int, width: int) -> None:
    frames, encoder = moving_shape(6, height, width), FragmentEncoder(height=height, width=width, fps=24)
    parts = [encoder.encode(frame, is_key_frame=index % 3 == 0) for index, frame in enumerate(frames)]

    assert [boxes(part) for part in parts] == [["ftyp", "moov", "moof", "mdat"], *[["moof", "mdat"]] * 5]
    for count in range(1, 7):  # nothing of a frame waits for the next
        with av.open(io.BytesIO(b"".join(parts[:count]))) as container:
            stream = container.streams.video[0]
            decoded = list(container.decode(stream))
            assert [frame.pts * frame.time_base * 24 for frame in decoded] == list(range(count))
            assert [frame.key_frame for frame in decoded] == [index % 3 == 0 for index in range(count)]
            assert stream.average_rate == 24
    difference = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]).astype(int) - frames
    assert np.abs(difference).mean() < 6  # chroma has a quarter of the pixels


def test_the_type_is_that_of_the_stream() -> None:
    encoder = FragmentEncoder(height=704, width=1280, fps=24)
    mime, first = encoder.mime, encoder.encode(moving_shape(1, 704, 1280)[0], is_key_frame=True)
    with av.open(io.BytesIO(first)) as container:
        profile, level = container.streams.video[0].codec_context.profile, first[first.index(b"avcC") + 7]
    assert profile == "Constrained Baseline" and mime == f'video/mp4; codecs="avc1.42c0{level:02x}"'
    with pytest.raises(ValueError, match=r"has no H\.264 stream"):
        codec_name(b"moov")


def test_times_go_on_beyond_a_day() -> None:
    """Fragments know their own time, in 64 bits."""
    encoder, frame = FragmentEncoder(height=16, width=16, fps=24), moving_shape(1, 16, 16)[0]
    first = encoder.encode(frame, is_key_frame=True)
    encoder._count = 24 * 86_400 * 30
    late = encoder.encode(frame, is_key_frame=True)
    with av.open(io.BytesIO(first + late)) as container:
        assert [frame.pts * frame.time_base for frame in container.decode(video=0)] == [0, 86_400 * 30]


def test_pictures() -> None:
    encoder, frames = frame_encoder("jpeg", height=64, width=64, fps=24), moving_shape(2, 64, 64)
    assert encoder.mime == "image/jpeg"
    for frame in frames:
        data = encoder.encode(frame, is_key_frame=False)
        assert data[:3] == b"\xff\xd8\xff" and len(data) < 4000
