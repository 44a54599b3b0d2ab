"""Streams on a GPU: asynchronous decoding on a CUDA stream of its own, and the same video as a CPU makes."""

import time

import numpy as np
import pytest
import torch

from tests.support.checks import needs_gpu, needs_two_gpus
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


def frames_of(session) -> np.ndarray:
    with session:
        return np.concatenate([chunk.frames[0] for chunk in session])


@needs_gpu
def test_asynchronous_decoding_gives_identical_frames():
    pipe = tiny_pipeline().to("cuda")
    arguments = tiny_arguments(num_frames=61, output_type="np")
    plain = frames_of(pipe.stream(**arguments))
    for _ in range(3):  # a race would not show every time
        again = frames_of(pipe.stream(**tiny_arguments(num_frames=61, output_type="np"), async_decode=True))
        np.testing.assert_array_equal(again, plain)


@needs_gpu
def test_frames_that_stay_on_the_gpu_are_ready_for_the_consumer():
    pipe = tiny_pipeline().to("cuda")
    expected = frames_of(pipe.stream(**tiny_arguments(num_frames=61, output_type="np")))
    with pipe.stream(**tiny_arguments(num_frames=61, output_type="pt"), async_decode=True) as session:
        copies = [chunk.frames[0].clone() for chunk in session]
    frames = torch.cat(copies).permute(0, 2, 3, 1).cpu().numpy()
    np.testing.assert_allclose(frames, expected, atol=1e-6)


@needs_gpu
def test_embeddings_made_on_another_stream_are_waited_for():
    pipe = tiny_pipeline().to("cuda")
    expected = frames_of(pipe.stream(**tiny_arguments(output_type="np")))
    with torch.cuda.stream(torch.cuda.Stream()):
        session = pipe.stream(**tiny_arguments(output_type="np"), async_decode=True)
    np.testing.assert_array_equal(frames_of(session), expected)


@needs_gpu
def test_twenty_sessions_need_no_more_memory_than_two():
    pipe = tiny_pipeline().to("cuda")
    reserved = []
    for _ in range(20):
        frames_of(pipe.stream(**tiny_arguments(num_frames=61, output_type="np"), async_decode=True))
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[2:]) <= reserved[1]


@needs_gpu
@needs_two_gpus
def test_the_vae_on_a_second_gpu_gives_identical_frames():
    pipe = tiny_pipeline().to("cuda:0")
    expected = frames_of(pipe.stream(**tiny_arguments(num_frames=61, output_type="np")))
    pipe.vae.to("cuda:1")
    for _ in range(3):
        again = frames_of(pipe.stream(**tiny_arguments(num_frames=61, output_type="np"), async_decode=True))
        np.testing.assert_array_equal(again, expected)


@needs_gpu
@needs_two_gpus
def test_a_pipeline_on_the_second_gpu_leaves_the_first_alone():
    pipe = tiny_pipeline().to("cuda:1")
    before = torch.cuda.memory_allocated(0)
    frames_of(pipe.stream(**tiny_arguments(output_type="np"), async_decode=True))
    assert torch.cuda.memory_allocated(0) == before


@needs_gpu
def test_a_gpu_makes_the_latents_that_a_cpu_makes():
    arguments = tiny_arguments(num_frames=29, output_type="latent")
    on_cpu = tiny_pipeline()(**arguments).frames
    on_gpu = tiny_pipeline().to("cuda")(**tiny_arguments(num_frames=29, output_type="latent")).frames
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-2, rtol=0)


@needs_gpu
@pytest.mark.parametrize("asynchronous", [False, True])
def test_bytes_are_those_of_the_floats_and_chunks_know_their_times(asynchronous):
    pipe = tiny_pipeline().to("cuda")
    expected = frames_of(pipe.stream(**tiny_arguments(num_frames=61, output_type="np")))
    arguments = tiny_arguments(num_frames=61, output_type="uint8")
    began = time.perf_counter()
    with pipe.stream(**arguments, async_decode=asynchronous) as session:
        chunks = list(session)
    passed = time.perf_counter() - began
    frames = np.concatenate([chunk.frames[0] for chunk in chunks])
    np.testing.assert_array_equal(frames, np.rint(expected * np.float32(255)))
    for times in ([chunk.denoise_seconds for chunk in chunks], [chunk.decode_seconds for chunk in chunks]):
        assert min(times) > 0 and sum(times) < passed
