"""What many tests assert, and what they need."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def logged_by(library: str = "diffusers") -> Iterator[list[str]]:
    """The messages that `library` logs meanwhile; diffusers does not hand its own to pytest."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(library)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def assert_raises(call: Callable, *numbers) -> None:
    """`call` raises one plain ValueError that says all of `numbers`, each as a whole."""
    with pytest.raises(ValueError) as raised:
        call()
    assert type(raised.value) is ValueError
    assert raised.value.__cause__ is None and raised.value.__context__ is None, "one error, not one about another"
    message = str(raised.value)
    for number in map(str, numbers):
        assert re.search(rf"(?<![\w.]){re.escape(number)}(?!\d)", message), f"{number} is not in: {message}"


NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
)
"""The marks of tests that no CPU can stand in for, for a whole module (`pytestmark = [*NEEDS_GPU]`)."""


def needs_gpu(test):
    """For a single test that no CPU can stand in for."""
    gpu, skipped_without = NEEDS_GPU
    return gpu(skipped_without(test))


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors in another dtype where none is asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
