"""Errors that are the user's to mend are one line, which speaks of options; all others are shown whole."""

import argparse

import pytest
import torch

from longlive_diffusers.cli.errors import one_line


ARGS = argparse.Namespace(run=print, prompts=["x"], height=100, window_size=4, steps=3, negative_prompt=None)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("`height` must be\n   a multiple"), "--height must be a multiple"),
        (ValueError("`window_size` 4, `negative_prompt`"), "--window-size 4, --negative-prompt"),
        (ValueError("`num_inference_steps` must be"), "--steps must be"),
        (ValueError("`chunk_size` is the model's, `run` and `prompts` are no options"),) * 2,
        (OSError(28, "No space left on device", "video.mp4"), "No space left on device: 'video.mp4'"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the Hub\ncannot be reached"), "the Hub cannot be reached"),
        (
            MemoryError(),
            "out of memory; what needs less: a smaller --window-size, a smaller --height and --width (MemoryError)",
        ),
        (RuntimeError("Expected all tensors to be on the same device"), None),
        (KeyError("weight"), None),
    ],
)
def test_what_is_told(error, line):
    assert one_line(error, ARGS) == (str(line) if isinstance(line, ValueError) else line)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**46),
        lambda: torch.empty(2**40, 2**40),
        lambda: torch.zeros(1).expand(2**62).clone(),
    ],
    ids=["too much", "uncountable", "more than can be addressed"],
)
def test_what_torch_says_when_memory_is_not_there_is_known(allocate):
    with pytest.raises(RuntimeError) as error:
        allocate()
    assert one_line(error.value, None).startswith("out of memory (")
