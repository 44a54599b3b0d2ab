"""What a caller gave to a stream, or got from it, is the caller's: to change it later changes nothing else."""

import pytest
import torch

from tests.support.tiny_pipeline import CHANNELS, CHUNK_SIZE, SIDE, tiny_arguments, tiny_pipeline


@pytest.fixture
def pipe():
    return tiny_pipeline()


def test_frames_that_are_latents(pipe):
    """Neither what history is rewritten from, nor the latents that a video was continued from."""
    given = torch.randn(1, CHANNELS, CHUNK_SIZE, SIDE, SIDE)
    before = given.clone()

    def chunks(spoil: bool) -> list[torch.Tensor]:
        found = []
        with pipe.stream(**tiny_arguments(video_latents=given, num_frames=29)) as session:
            for chunk in session:
                found.append(chunk.frames.clone())
                if spoil:
                    chunk.frames.zero_()
                session.prompt = f"a dog {chunk.index}"  # rewrites the history
        return found

    for found, expected in zip(chunks(spoil=True), chunks(spoil=False), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(given, before)


@pytest.mark.parametrize("redirect", ["prompt", "cut", "blend"])
def test_a_list_of_prompts(pipe, redirect):
    prompts = ["a dog", "a bird"]
    with pipe.stream(**tiny_arguments(prompt=["a cat", "a fox"])) as session:
        next(session)
        if redirect == "prompt":
            session.prompt = prompts
        elif redirect == "cut":
            session.cut(prompts)
        else:
            session.blend(prompts)
        prompts[0] = "a fish"
        assert session.prompt == next(session).prompt == ["a dog", "a bird"]
