"""Streams on a GPU: asynchronous decoding on a CUDA stream of its own, and the same video as a CPU makes."""

import numpy as np
import torch

from tests.support.checks import needs_gpu
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


def frames_of(session) -> np.ndarray:
    with session:
        return np.concatenate([chunk.frames[0] for chunk in session])


@needs_gpu
def test_asynchronous_decoding_gives_identical_frames():
    pipe = tiny_pipeline().to("cuda")
    arguments = tiny_arguments(num_frames=61)
    plain = frames_of(pipe.stream(**arguments))
    for _ in range(3):  # a race would not show every time
        again = frames_of(pipe.stream(**tiny_arguments(num_frames=61), async_decode=True))
        np.testing.assert_array_equal(again, plain)


@needs_gpu
def test_frames_that_stay_on_the_gpu_are_ready_for_the_consumer():
    pipe = tiny_pipeline().to("cuda")
    expected = frames_of(pipe.stream(**tiny_arguments(num_frames=61)))
    with pipe.stream(**tiny_arguments(num_frames=61, output_type="pt"), async_decode=True) as session:
        copies = [chunk.frames[0].clone() for chunk in session]
    frames = torch.cat(copies).permute(0, 2, 3, 1).cpu().numpy()
    np.testing.assert_allclose(frames, expected, atol=1e-6)


@needs_gpu
def test_a_gpu_makes_the_latents_that_a_cpu_makes():
    arguments = tiny_arguments(num_frames=29, output_type="latent")
    on_cpu = tiny_pipeline()(**arguments).frames
    on_gpu = tiny_pipeline().to("cuda")(**tiny_arguments(num_frames=29, output_type="latent")).frames
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-2, rtol=0)
